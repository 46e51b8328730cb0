// Which pixels a direct convolution computes together, and which products they need.
//
// A Plan lists, for every tile of pixels, the runs of products of packed streams with a weight
// panel; the forward pass and the input gradient differ only in their plans: the latter has one
// class of pixels for each residue modulo the stride.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "shape.h"
#include "tile.h"

namespace cibp {

// A kernel tap: it multiplies the source at the pixel's base plus (y, x) by the panel's rows from
// tap * channels on.
struct Tap {
  int64_t y, x;
  int64_t kernel_y, kernel_x;
};

// Pixels of an output image that use the same taps: (first + i * step) in each direction, with the
// source base (base + i * base_step).
struct PixelClass {
  struct Axis {
    int64_t first, step, base, base_step;
  } y, x;
  std::vector<Tap> taps;  // in the order of their rows in the panel
  int64_t first_row = 0;  // of the panel, in taps
};

// A strip of output rows, and the source rows it reads (those outside of the image are zero).
struct Strip {
  int64_t begin, end;
  int64_t source_begin, source_end;
  int64_t tile_begin, tile_end;
};

struct Tile {
  int64_t first_pixel;  // index into pixels and targets
  int64_t count;        // of its pixels; those after them repeat the last one
  int64_t first_run, run_count;
  bool accumulate;    // onto the products of an earlier tile of the same pixels
  bool last;          // none comes after
  bool twin = false;  // the next tile, of as many pixels after these, has the same runs
};

struct Plan {
  int64_t channels;               // of the source
  int64_t column_begin, columns;  // of the packed source; column_begin <= 0 is the left padding
  int64_t max_source_rows, max_pixels;  // of a strip
  std::vector<PixelClass> classes;
  std::vector<Strip> strips;
  std::vector<Tile> tiles;
  std::vector<int64_t> pixels,
      targets;  // source offset from the strip's first row; output pixel in the strip
  std::vector<Run> runs;
};

// Output rows of a strip: enough pixels to use the weights well, few enough for their streams to
// stay in cache.
constexpr int64_t kStripPixels = 256;

inline int64_t strip_rows(int64_t height, int64_t width) {
  const int64_t strips =
      std::max<int64_t>(1, ceil_div(height, std::max<int64_t>(1, kStripPixels / width)));
  return ceil_div(height, strips);
}

// Rows of the weight panel that a tile uses at once.
constexpr int64_t kPanelRows = 256;

template <int STREAMS>
void add_tiles(Plan& plan, Strip& strip, const PixelClass& pixel_class, int64_t width,
               int64_t source_height, int64_t source_width) {
  constexpr int P = kTilePixels<STREAMS>;
  struct Pixel {
    int64_t target, y, x;
  };
  std::vector<Pixel> pixels;
  for (int64_t i = 0;; ++i) {
    const int64_t y = pixel_class.y.first + i * pixel_class.y.step;
    if (y >= strip.end) break;
    if (y < strip.begin) continue;
    for (int64_t j = 0;; ++j) {
      const int64_t x = pixel_class.x.first + j * pixel_class.x.step;
      if (x >= width) break;
      pixels.push_back({(y - strip.begin) * width + x,
                        pixel_class.y.base + i * pixel_class.y.base_step,
                        pixel_class.x.base + j * pixel_class.x.base_step});
    }
  }
  // Those that need the same taps, side by side: a tile computes each tap for all of its pixels.
  const auto outside = [&](const Pixel& pixel) {
    std::array<int64_t, 4> taps{};  // beyond each side
    for (const Tap& tap : pixel_class.taps) {
      taps[0] += pixel.y + tap.y < 0;
      taps[1] += pixel.y + tap.y >= source_height;
      taps[2] += pixel.x + tap.x < 0;
      taps[3] += pixel.x + tap.x >= source_width;
    }
    return taps;
  };
  std::vector<std::pair<std::array<int64_t, 4>, Pixel>> keyed;
  for (const Pixel& pixel : pixels) keyed.emplace_back(outside(pixel), pixel);
  std::stable_sort(keyed.begin(), keyed.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::transform(keyed.begin(), keyed.end(), pixels.begin(),
                 [](const auto& each) { return each.second; });
  const int64_t row_stride = STREAMS * plan.columns * plan.channels;
  const int64_t first_pixel = static_cast<int64_t>(plan.pixels.size());
  for (size_t i = 0; i < (pixels.size() + P - 1) / P * P;
       ++i) {  // the last tile repeats the last pixel
    const Pixel& pixel = pixels[std::min(i, pixels.size() - 1)];
    plan.targets.push_back(pixel.target);
    plan.pixels.push_back((pixel.y - strip.source_begin) * row_stride +
                          (pixel.x - plan.column_begin) * plan.channels);
  }
  // All tiles use some taps before any uses the next: the weights of those stay in the first-level
  // cache.
  const size_t taps_at_once = std::max<int64_t>(1, kPanelRows / plan.channels);
  const size_t taps = std::max<size_t>(1, pixel_class.taps.size());
  bool second = false;  // whether the last tile is the twin of the one before
  for (size_t k0 = 0; k0 < taps; k0 += taps_at_once)
    for (size_t first = 0; first < pixels.size(); first += P) {
      const size_t last = std::min(pixels.size(), first + P);
      Tile tile{first_pixel + static_cast<int64_t>(first),
                static_cast<int64_t>(last - first),
                static_cast<int64_t>(plan.runs.size()),
                0,
                k0 > 0,
                k0 + taps_at_once >= taps};
      // Taps that read only padding, for every pixel of the tile, are left out. (A weight that is
      // not finite makes a border pixel NaN, 0 x inf, only where its tile uses the tap.)
      for (size_t k = k0; k < std::min(pixel_class.taps.size(), k0 + taps_at_once); ++k) {
        const Tap& tap = pixel_class.taps[k];
        const bool used =
            std::any_of(pixels.begin() + first, pixels.begin() + last, [&](const Pixel& pixel) {
              const int64_t y = pixel.y + tap.y, x = pixel.x + tap.x;
              return y >= 0 && y < source_height && x >= 0 && x < source_width;
            });
        if (!used) continue;
        const Run run{tap.y * row_stride + tap.x * plan.channels,
                      (pixel_class.first_row + static_cast<int64_t>(k)) * plan.channels,
                      plan.channels};
        if (tile.run_count > 0) {
          Run& previous = plan.runs.back();
          if (previous.source + previous.length == run.source &&
              previous.row + previous.length == run.row) {
            previous.length += run.length;
            continue;
          }
        }
        plan.runs.push_back(run);
        ++tile.run_count;
      }
      if (tile.run_count == 0 && tile.accumulate && !tile.last) continue;
      if (static_cast<int64_t>(plan.tiles.size()) > strip.tile_begin && !second) {
        Tile& before = plan.tiles.back();
        const Run* runs = plan.runs.data();
        second = before.twin =
            before.first_pixel + P == tile.first_pixel && before.accumulate == tile.accumulate &&
            before.last == tile.last &&
            std::equal(runs + before.first_run, runs + before.first_run + before.run_count,
                       runs + tile.first_run, runs + tile.first_run + tile.run_count);
      } else {
        second = false;
      }
      plan.tiles.push_back(tile);
    }
}

// A plan for an output image of height x width from a source image of source_height x source_width.
template <int STREAMS>
Plan make_plan(std::vector<PixelClass> classes, int64_t channels, int64_t height, int64_t width,
               int64_t source_height, int64_t source_width) {
  Plan plan{};
  plan.channels = channels;
  // The rows and columns that any pixel of a range reads, used or not.
  const auto reach = [&](auto axis, auto tap_axis, int64_t begin, int64_t end) {
    int64_t low = 0, high = 0;
    bool any = false;
    for (const PixelClass& pixel_class : classes) {
      const PixelClass::Axis& a = pixel_class.*axis;
      const int64_t i0 = begin > a.first ? ceil_div(begin - a.first, a.step) : 0;
      if (a.first + i0 * a.step >= end) continue;
      const int64_t i1 = (end - 1 - a.first) / a.step;
      for (const Tap& tap : pixel_class.taps) {
        const int64_t from = a.base + i0 * a.base_step + tap.*tap_axis,
                      to = a.base + i1 * a.base_step + tap.*tap_axis + 1;
        low = any ? std::min(low, from) : from;
        high = any ? std::max(high, to) : to;
        any = true;
      }
    }
    return std::pair<int64_t, int64_t>(low, high);
  };
  const auto [column_begin, column_end] = reach(&PixelClass::x, &Tap::x, int64_t{0}, width);
  plan.column_begin = std::min<int64_t>(column_begin, 0);
  plan.columns = std::max(column_end, source_width) - plan.column_begin;
  const int64_t rows = strip_rows(height, width);
  for (int64_t y = 0; y < height; y += rows) {
    Strip strip{};
    strip.begin = y;
    strip.end = std::min(height, y + rows);
    std::tie(strip.source_begin, strip.source_end) =
        reach(&PixelClass::y, &Tap::y, strip.begin, strip.end);
    strip.tile_begin = static_cast<int64_t>(plan.tiles.size());
    for (const PixelClass& pixel_class : classes)
      add_tiles<STREAMS>(plan, strip, pixel_class, width, source_height, source_width);
    strip.tile_end = static_cast<int64_t>(plan.tiles.size());
    plan.max_source_rows = std::max(plan.max_source_rows, strip.source_end - strip.source_begin);
    plan.max_pixels = std::max(plan.max_pixels, (strip.end - strip.begin) * width);
    plan.strips.push_back(strip);
  }
  plan.classes = std::move(classes);
  return plan;
}

inline std::vector<PixelClass> forward_classes(const Shape& s) {
  PixelClass pixel_class;
  pixel_class.y = {0, 1, -s.padding_height, s.stride_height};
  pixel_class.x = {0, 1, -s.padding_width, s.stride_width};
  for (int64_t ky = 0; ky < s.kernel_height; ++ky)
    for (int64_t kx = 0; kx < s.kernel_width; ++kx)
      pixel_class.taps.push_back({ky * s.dilation_height, kx * s.dilation_width, ky, kx});
  return {pixel_class};
}

// Input pixel y takes output row (y + padding - dilation ky) / stride for each ky where that is
// whole.
inline std::vector<PixelClass> input_gradient_classes(const Shape& s) {
  std::vector<PixelClass> classes;
  int64_t row = 0;
  for (int64_t py = 0; py < s.stride_height; ++py)
    for (int64_t px = 0; px < s.stride_width; ++px) {
      const auto axis = [](int64_t residue, int64_t stride, int64_t padding) {
        const int64_t first =
            ((residue - padding) % stride + stride) % stride;  // least y >= 0 of this residue
        return PixelClass::Axis{first, stride, (first + padding - residue) / stride, 1};
      };
      PixelClass pixel_class;
      pixel_class.y = axis(py, s.stride_height, s.padding_height);
      pixel_class.x = axis(px, s.stride_width, s.padding_width);
      for (int64_t ky = s.kernel_height - 1; ky >= 0; --ky)  // so that the source offsets grow
        for (int64_t kx = s.kernel_width - 1; kx >= 0; --kx) {
          const int64_t y = py - s.dilation_height * ky, x = px - s.dilation_width * kx;
          if (y % s.stride_height == 0 && x % s.stride_width == 0)
            pixel_class.taps.push_back({y / s.stride_height, x / s.stride_width, ky, kx});
        }
      pixel_class.first_row = row;
      row += static_cast<int64_t>(pixel_class.taps.size());
      classes.push_back(std::move(pixel_class));
    }
  return classes;
}

}  // namespace cibp
