// Prologues and epilogues: between torch's tensors (lower, upper, nominal; any strides) and the
// packed streams (center, radius, nominal; channels last) that the tiles read and write.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "tile.h"
#include "vec.h"

namespace cibp {

// A tensor argument seen as channels x pixels. A pixel is a column of an image row, or a row of a
// matrix.
template <class T>
struct Plane {
  const T* data;
  int64_t channel_stride, pixel_stride;
  const T* end;  // past the tensor's last element: full vectors may be read up to here
};

// Most sources of one prologue: the three gradients, and both bounds for the width's gradient.
constexpr int kMaxSources = 5;

// (lower, upper, nominal) -> (center, radius, nominal). Halves are taken first, so that large
// bounds do not overflow.
template <class T, int STREAMS_>
struct CenterRadius {
  static constexpr int STREAMS = STREAMS_, SOURCES = STREAMS_;
  template <class V>
  void operator()(const V* in, V* out) const {
    const V lower = T(0.5) * in[0], upper = T(0.5) * in[1];
    out[0] = lower + upper;
    out[1] = upper - lower;
    if constexpr (STREAMS == 3) out[2] = in[2];
  }
};

// Gradients of (lower', upper', nominal') and of width = sum (upper' - lower')^2 -> those of
// (center', radius', nominal').
template <class T, int STREAMS_, bool WIDTH>
struct OutputGradient {
  static constexpr int STREAMS = STREAMS_, SOURCES = STREAMS_ + (WIDTH ? 2 : 0);
  T width_gradient;
  template <class V>
  void operator()(const V* in, V* out) const {
    out[0] = in[0] + in[1];
    out[1] = in[1] - in[0];
    if constexpr (WIDTH) out[1] += T(4) * width_gradient * difference(in[STREAMS], in[STREAMS + 1]);
    if constexpr (STREAMS == 3) out[2] = in[2];
  }
};

namespace detail {

// rows[x][c] of at most kLanes pixels and channels; what lies beyond `pixels` and `channels` is
// unspecified.
template <class T>
[[gnu::noinline]] void load_block(const Plane<T>& plane, int64_t channel, int64_t channels,
                                  int64_t pixel, int64_t pixels, Vec<T>* rows) {
  constexpr int L = kLanes<T>;
  const T* p = plane.data + channel * plane.channel_stride + pixel * plane.pixel_stride;
  if (plane.pixel_stride == 1 && channels == L &&
      p + (L - 1) * plane.channel_stride + L <= plane.end) {
#pragma GCC unroll 16
    for (int c = 0; c < L; ++c) rows[c] = load(p + c * plane.channel_stride);
    transpose<T>(rows);
  } else {
    T block[L * L] = {};
    for (int x = 0; x < pixels; ++x)
      for (int c = 0; c < channels; ++c)
        block[x * L + c] = p[c * plane.channel_stride + x * plane.pixel_stride];
    for (int x = 0; x < pixels; ++x) rows[x] = load(block + x * L);
  }
}

}  // namespace detail

// Packs channels x pixels: out[pixel * pixel_stride + stream * stream_stride + channel].
template <class T, class Prologue>
void pack(const Prologue& prologue, const Plane<T>* sources, int64_t channels, int64_t pixels,
          int64_t pixel_stride, int64_t stream_stride,
          // outputs
          T* out) {
  constexpr int L = kLanes<T>, S = Prologue::STREAMS, K = Prologue::SOURCES;
  const bool contiguous =
      std::all_of(sources, sources + K, [](const Plane<T>& p) { return p.channel_stride == 1; });
  // A vector of few channels, as the first layer's 1 or 3, would be mostly empty.
  const int64_t vector_channels =
      channels % L >= L / 2 && !contiguous ? channels : channels / L * L;
  if (contiguous)
    for (int64_t x = 0; x < pixels; ++x)
      for (int64_t c = 0; c < vector_channels; c += L) {
        Vec<T> in[K], streams[S];
        for (int k = 0; k < K; ++k) in[k] = load(sources[k].data + x * sources[k].pixel_stride + c);
        prologue(in, streams);
        for (int s = 0; s < S; ++s)
          store<T>(out + x * pixel_stride + s * stream_stride + c, streams[s]);
      }
  for (int64_t c = contiguous ? vector_channels : 0; c < vector_channels; c += L) {
    const int64_t count = channels - c < L ? channels - c : L;
    for (int64_t x = 0; x < pixels; x += L) {
      const int64_t columns = pixels - x < L ? pixels - x : L;
      Vec<T> rows[K][L];
      for (int k = 0; k < K; ++k) detail::load_block<T>(sources[k], c, count, x, columns, rows[k]);
      for (int i = 0; i < columns; ++i) {
        Vec<T> in[K], streams[S];
        for (int k = 0; k < K; ++k) in[k] = rows[k][i];
        prologue(in, streams);
        T* target = out + (x + i) * pixel_stride + c;
        for (int s = 0; s < S; ++s) store_some<T>(target + s * stream_stride, streams[s], count);
      }
    }
  }
  for (int64_t c = vector_channels; c < channels; ++c)
    for (int64_t x = 0; x < pixels; ++x) {
      T in[K], streams[S];
      for (int k = 0; k < K; ++k)
        in[k] = sources[k].data[c * sources[k].channel_stride + x * sources[k].pixel_stride];
      prologue(in, streams);
      for (int s = 0; s < S; ++s) out[x * pixel_stride + s * stream_stride + c] = streams[s];
    }
}

// (center', radius', nominal') without bias -> (lower', upper', nominal').
template <class T, int STREAMS_>
struct Bounds {
  static constexpr int STREAMS = STREAMS_;
  static constexpr bool kWidth = true;
  const T* bias;  // [channels, rounded up to a vector]
  void operator()(int64_t channel, const Vec<T>* in, Vec<T>* out) const {
    const Vec<T> b = load(bias + channel), center = in[0] + b;
    out[0] = center - in[1];
    out[1] = center + in[1];
    if constexpr (STREAMS == 3) out[2] = in[2] + b;
  }
};

// Gradients of (center, radius, nominal) -> those of (lower, upper, nominal).
template <class T, int STREAMS_>
struct InputGradient {
  static constexpr int STREAMS = STREAMS_;
  static constexpr bool kWidth = false;
  void operator()(int64_t, const Vec<T>* in, Vec<T>* out) const {
    const Vec<T> center = T(0.5) * in[0], radius = T(0.5) * in[1];
    out[0] = center - radius;
    out[1] = center + radius;
    if constexpr (STREAMS == 3) out[2] = in[2];
  }
};

// Where an epilogue writes: element (pixel, channel) at pixel * pixel_stride + channel *
// channel_stride, one of the strides being 1.
template <class T>
struct Target {
  T* data[3];  // lower, upper, nominal
  int64_t channel_stride, pixel_stride;
};

// Unpacks product[pixel][stream][channel] (a pixel's stream being `block` long) and returns the sum
// of (upper - lower)^2 where the epilogue has a width, else 0. Vectors of product are read whole,
// past `pixels` too.
template <class T, class Epilogue>
double unpack(const Epilogue& epilogue, const T* product, int64_t block, int64_t channel,
              int64_t channels, int64_t pixels, const Target<T>& target) {
  constexpr int L = kLanes<T>, S = Epilogue::STREAMS;
  const bool planar = target.pixel_stride == 1 && target.channel_stride != 1;
  double width = 0;
  for (int64_t c = 0; c < channels; c += L) {
    const int64_t count = channels - c < L ? channels - c : L;
    for (int64_t x = 0; x < pixels; x += L) {
      const int64_t columns = pixels - x < L ? pixels - x : L;
      Vec<T> rows[S][L];  // [pixel][channel]
      for (int i = 0; i < L; ++i) {
        Vec<T> in[S], out[S];
        for (int s = 0; s < S; ++s) in[s] = load(product + ((x + i) * S + s) * block + c);
        epilogue(channel + c, in, out);
        for (int s = 0; s < S; ++s) rows[s][i] = out[s];
      }
      if (planar)
        for (int s = 0; s < S; ++s) transpose<T>(rows[s]);
      const int64_t lines = planar ? count : columns, length = planar ? columns : count;
      const int64_t stride = planar ? target.channel_stride : target.pixel_stride;
      for (int s = 0; s < S; ++s) {
        T* corner =
            target.data[s] + (channel + c) * target.channel_stride + x * target.pixel_stride;
        if (length == L)
          for (int i = 0; i < lines; ++i) store<T>(corner + i * stride, rows[s][i]);
        else
          for (int i = 0; i < lines; ++i)
            std::memcpy(corner + i * stride, &rows[s][i], static_cast<size_t>(length) * sizeof(T));
      }
      if constexpr (Epilogue::kWidth) {
        Vec<T> squares{};
        for (int i = 0; i < lines; ++i) {
          Vec<T> size = difference(rows[0][i], rows[1][i]);
          if (length < L)
            for (int64_t j = length; j < L; ++j) size[j] = 0;
          squares += size * size;
        }
        width += static_cast<double>(sum<T>(squares));
      }
    }
  }
  return width;
}

}  // namespace cibp
