// Interval convolution 3x3 of stride 1 on Hopper's tensor cores, for many channels.
//
// The product is W (64 output channels on the M side, from registers) times the input's pixels (N,
// from shared memory), and |W| is a bit mask away from W. A block stages the halo of its outputs
// once, and a tap of the kernel is another start address of the same memory:
//
//   [stage][stream][plane][pixel of the halo, row by row][16 bytes]
//
// where a plane is the 16 bytes (4 or 8 channels) of every pixel that are staged together. To a
// matrix descriptor without swizzle, 8 pixels of a row are the 8 rows of a core matrix, the next
// row's 8 are one stride (SBO) further, and the next plane is one leading dimension (LBO) further.
// 32 bytes of a pixel, two planes, are one multiplication deep: 8 channels in tf32, 16 in bfloat16.
#pragma once

#include <stdexcept>
#include <string>

#include "precision.h"
#include "shape.h"
#include "wgmma.h"

namespace cibp::cuda {

constexpr int kHaloTaps = 9;
constexpr int kHaloSteps = 2;      // multiplications of a tap, on what is staged at a time
constexpr int kHaloChannels = 64;  // outputs of a block, the M of the multiplication
constexpr int kStagedBytes = 32 * kHaloSteps;  // of a pixel

template <class T>
constexpr int kStagedChannels = kStagedBytes / static_cast<int>(sizeof(T));

// Register q of a thread's part of W, as wgmma takes it: its row (output channel), and the first of
// the 4 bytes of that row.
CIBP_HOST_DEVICE int fragment_row(int thread, int q) {
  return thread / 32 % 4 * 16 + thread % 32 / 4 + q % 2 * 8;
}
CIBP_HOST_DEVICE int fragment_byte(int thread, int q) { return thread % 4 * 4 + q / 2 * 16; }

// Number i of a thread's part of the result: its row (output channel) and column (pixel).
CIBP_HOST_DEVICE int result_row(int thread, int i) {
  return thread / 32 % 4 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
}
CIBP_HOST_DEVICE int result_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// Matrix descriptor without swizzle; addresses and distances in bytes.
CIBP_HOST_DEVICE uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
         static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32;
}

template <class T>
inline void check_halo(const ConvShape& s) {
  if (s.kernel_height != 3 || s.kernel_width != 3 || s.stride_height != 1 || s.stride_width != 1 ||
      s.dilation_height != 1 || s.dilation_width != 1)
    throw std::invalid_argument("halo_conv2d: kernels must be 3 x 3, of stride and dilation 1");
  if (s.in_channels % kStagedChannels<T> != 0 || s.out_channels % kHaloChannels != 0)
    throw std::invalid_argument(
        "halo_conv2d: in_channels must be a multiple of " + std::to_string(kStagedChannels<T>) +
        " and out_channels of " + std::to_string(kHaloChannels) + ", not " +
        std::to_string(s.in_channels) + " and " + std::to_string(s.out_channels));
}

// W [K, C, 3, 3], rounded, -> [K / 64][C / kStagedChannels][tap][step][thread of 128][4 registers].
template <class T>
struct HaloPackWeight {
  static constexpr int kThreads = 256, kMinBlocks = 2;

  int in_channels, out_channels, dropped;
  const float* weight;

  // outputs
  uint32_t* out;

  int64_t words() const {
    return static_cast<int64_t>(out_channels) * in_channels * kHaloTaps * sizeof(T) / 4;
  }
  Grid grid() const { return {ceil_div(words(), kThreads), 1, 1}; }
  int shared_floats() const { return 0; }

  template <class Block>
  CIBP_DEVICE void operator()(Block& block, float*) const {
    const int64_t count = static_cast<int64_t>(out_channels) * in_channels * kHaloTaps *
                          static_cast<int64_t>(sizeof(T)) / 4;
    block.each([&](int t) {
      const int64_t i = static_cast<int64_t>(block.x) * kThreads + t;
      if (i >= count) return;
      const int q = static_cast<int>(i % 4), thread = static_cast<int>(i / 4 % 128);
      const int step = static_cast<int>(i / 512 % kHaloSteps);
      const int64_t rest = i / 512 / kHaloSteps;
      const int tap = static_cast<int>(rest % kHaloTaps);
      const int chunks = in_channels / kStagedChannels<T>;
      const int chunk = static_cast<int>(rest / kHaloTaps % chunks);
      const int row =
          static_cast<int>(rest / kHaloTaps / chunks) * kHaloChannels + fragment_row(thread, q);
      const int byte = chunk * kStagedBytes + step * 32 + fragment_byte(thread, q);
      T values[4 / sizeof(T)];
      for (int j = 0; j < static_cast<int>(4 / sizeof(T)); ++j) {
        const int64_t channel = byte / static_cast<int>(sizeof(T)) + j;
        const float w =
            weight[(row * static_cast<int64_t>(in_channels) + channel) * kHaloTaps + tap];
        values[j] = stored<T>(rounded(w, dropped));
      }
      std::memcpy(out + i, values, 4);
    });
  }
};

// Streams [STREAMS, N, H, W, C] -> [STREAMS, N, H', W', K], both contiguous and rounded to what
// they are stored in. Each of two warpgroups has 8 rows of 8 outputs.
template <int STREAMS, class T>
struct HaloConv2d {
  static constexpr int kThreads = 256, kMinBlocks = 1;
  static constexpr int kRows = 16, kColumns = 8;
  static constexpr int kHaloColumns = kColumns + 2, kHalo = (kRows + 2) * kHaloColumns;
  static constexpr int kPlanes = kStagedBytes / 16;
  // Pixels from one plane to the next, so that 8 copies, of 2 pixels, lie in different banks.
  static constexpr int kPlane = 186;
  static constexpr int kStreamBytes = kPlanes * kPlane * 16, kStageBytes = STREAMS * kStreamBytes;
  static_assert(kPlane >= kHalo && kPlane % 8 == 2);

  ConvShape shape;
  int down, across;  // tiles of an image
  const T* in;
  const uint32_t* weight;  // HaloPackWeight
  const float* bias;       // [K], or null
  bool relu;
  int dropped;

  // outputs
  T* out;
  float* width;  // [blocks] sums of 4 radius^2, or null

  static HaloConv2d make(const ConvShape& shape, const T* in, const uint32_t* weight,
                         const float* bias, bool relu, int dropped,
                         // outputs
                         T* out, float* width) {
    check_halo<T>(shape);
    if (!aligned(in) || !aligned(weight))
      throw std::invalid_argument("halo_conv2d: input and weight must be aligned to 16 bytes");
    const int down = static_cast<int>(ceil_div(shape.out_height, kRows));
    const int across = static_cast<int>(ceil_div(shape.out_width, kColumns));
    return {shape, down, across, in, weight, bias, relu, dropped, out, width};
  }
  Grid grid() const {
    return {static_cast<int64_t>(shape.batch) * down * across, shape.out_channels / kHaloChannels,
            1};
  }
  int shared_floats() const { return 2 * kStageBytes / 4; }

  struct Thread {
    float sum[STREAMS][32];
    // of one tap and the next; whoever multiplies reads them until it is done
    uint32_t weight[2][kHaloSteps][4], magnitude[2][kHaloSteps][4];
  };

  // Byte, in a stage, of 16 bytes of a pixel of the halo.
  CIBP_HOST_DEVICE static int place(int stream, int plane, int row, int column) {
    return stream * kStreamBytes + (plane * kPlane + row * kHaloColumns + column) * 16;
  }

  template <class Block>
  CIBP_DEVICE void operator()(Block& block, float* shared) const {
    const int tile = block.x % (down * across), n = block.x / (down * across);
    const int top = tile / across * kRows, left = tile % across * kColumns;
    const int chunks = shape.in_channels / kStagedChannels<T>;
    char* const staged = reinterpret_cast<char*>(shared);
    const auto fragments = [&](int thread, int chunk, int tap, uint32_t (&w)[kHaloSteps][4]) {
      CIBP_UNROLL
      for (int k = 0; k < kHaloSteps; ++k) {
        const int64_t index =
            ((static_cast<int64_t>(block.y) * chunks + chunk) * kHaloTaps + tap) * kHaloSteps + k;
        const Pack<uint32_t, 4> pack = load_pack<4>(weight + (index * 128 + thread % 128) * 4);
        CIBP_UNROLL
        for (int q = 0; q < 4; ++q) w[k][q] = pack.value[q];
      }
    };

    typename Block::template PerThread<Thread> threads;
    block.each([&](int thread) {
      CIBP_UNROLL
      for (int s = 0; s < STREAMS; ++s) {
        CIBP_UNROLL
        for (int i = 0; i < 32; ++i) threads[thread].sum[s][i] = 0.0f;
      }
      copy(block, n, top, left, 0, thread, staged);
    });
    for (int chunk = 0; chunk < chunks; ++chunk) {
      char* const stage = staged + chunk % 2 * kStageBytes;
      block.each([&](int thread) {
        if (chunk + 1 < chunks)
          copy(block, n, top, left, chunk + 1, thread, staged + (chunk + 1) % 2 * kStageBytes);
        await_copies(block, chunk + 1 < chunks);
        fragments(thread, chunk, 0, threads[thread].weight[0]);
      });
      CIBP_UNROLL
      for (int tap = 0; tap < kHaloTaps; ++tap) {
        const int now = tap % 2;
        block.unsynced([&](int thread) {
          Thread& t = threads[thread];
          CIBP_UNROLL
          for (int k = 0; k < kHaloSteps; ++k) {
            CIBP_UNROLL
            for (int q = 0; q < 4; ++q)
              t.magnitude[now][k][q] =
                  t.weight[now][k][q] & (sizeof(T) == 4 ? 0x7fffffffu : 0x7fff7fffu);
          }
        });
        begin_multiply(block);
        CIBP_UNROLL
        for (int k = 0; k < kHaloSteps; ++k) {
          CIBP_UNROLL
          for (int s = 0; s < STREAMS; ++s)
            multiply(
                block, T{}, [&](int thread) -> float (&)[32] { return threads[thread].sum[s]; },
                [&](int thread) -> const uint32_t (&)[4] {
                  Thread& t = threads[thread];
                  return s == 1 ? t.magnitude[now][k] : t.weight[now][k];
                },
                [&](int thread) {
                  const int row = thread / 128 * 8 + tap / 3;
                  const char* first = stage + place(s, 2 * k, row, tap % 3);
                  return descriptor(shared_address(block, shared, first), kPlane * 16,
                                    kHaloColumns * 16);
                },
                shared);
        }
        end_multiply(block);
        await_multiply(block, true);  // the tap before has read the registers that are loaded now
        if (tap + 1 < kHaloTaps)
          block.unsynced([&](int thread) {
            fragments(thread, chunk, tap + 1, threads[thread].weight[1 - now]);
          });
      }
      await_multiply(block, false);
      block.each([&](int thread) {  // and all, before the stage is written again
        CIBP_UNROLL
        for (int s = 0; s < STREAMS; ++s) settle(threads[thread].sum[s]);
      });
    }

    block.each([&](int thread) {
      Thread& t = threads[thread];
      float squares = 0.0f;
      CIBP_UNROLL
      for (int i = 0; i < 32; ++i) {
        const int channel = block.y * kHaloChannels + result_row(thread, i);
        const int column = result_column(thread, i);
        const int y = top + thread / 128 * 8 + column / 8, x = left + column % 8;
        if (y >= shape.out_height || x >= shape.out_width) continue;
        const float b = bias ? bias[channel] : 0.0f;
        float m = t.sum[0][i] + b, r = t.sum[1][i];
        if (relu) activate(m, r);
        squares += 4.0f * r * r;
        round_pair(m, r, dropped);
        T* target = out + shape.out_place(n, y, x, channel);
        target[0] = stored<T>(m);
        target[shape.outputs()] = stored<T>(r);
        if constexpr (STREAMS == 3) {
          const float z = t.sum[2][i] + b;
          target[2 * shape.outputs()] = stored<T>(rounded(relu ? positive(z) : z, dropped));
        }
      }
      shared[thread] = squares;
    });
    if (width)
      sum_block<kThreads>(block, shared, [&](float sum) {
        width[static_cast<int64_t>(block.y) * shape.batch * down * across + block.x] = sum;
      });
  }

  // Starts to stage the halo, zeros around the image included.
  template <class Block>
  CIBP_DEVICE void copy(Block& block, int n, int top, int left, int chunk, int thread,
                        char* stage) const {
    for (int i = thread; i < STREAMS * kHalo * kPlanes; i += kThreads) {
      const int plane = i % kPlanes, pixel = i / kPlanes % kHalo, s = i / (kPlanes * kHalo);
      const int row = pixel / kHaloColumns, column = pixel % kHaloColumns;
      const int y = top + row - shape.padding_height, x = left + column - shape.padding_width;
      const bool inside = y >= 0 && y < shape.in_height && x >= 0 && x < shape.in_width;
      const T* source = in;  // anything readable, where zeros are written
      if (inside)
        source +=
            s * shape.inputs() +
            shape.in_place(n, y, x,
                           chunk * kStagedChannels<T> + plane * (16 / static_cast<int>(sizeof(T))));
      copy16(block, stage + place(s, plane, row, column), source, inside);
    }
    end_copies(block);
  }
};

}  // namespace cibp::cuda
