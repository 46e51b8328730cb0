// Numbers in bfloat16, the upper half of a float: how they are loaded, rounded and multiplied.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "vec.h"

namespace cibp {

using Halves __attribute__((vector_size(CIBP_VECTOR_BYTES / 2))) = uint16_t;

inline Halves load_halves(const BFloat16* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return halves;
}

inline Vec<float> as_float(Vec<uint32_t> bits) {
  Vec<float> v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// The kLanes numbers from p on.
template <class T>
inline Vec<T> numbers(const T* p) {
  return load(p);
}
inline Vec<float> numbers(const BFloat16* p) {
  return as_float(__builtin_convertvector(load_halves(p), Vec<uint32_t>) << 16);
}

inline float number(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
inline T number(T x) {
  return x;
}

inline Halves upper_halves(Vec<uint32_t> bits) {
  return __builtin_convertvector(bits >> 16, Halves);
}

// v rounded to nearest, ties to even; NaN stays NaN, and what is subnormal becomes 0.
inline Halves nearest(Vec<float> v) {
#ifdef __AVX512BF16__
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  Vec<uint32_t> bits;
  std::memcpy(&bits, &v, sizeof v);
  const Vec<uint32_t> rounded = bits + 0x7fff + (bits >> 16 & 1),
                      normal = (bits & 0x7f800000) == 0 ? bits & 0x80000000 : rounded;
  return upper_halves(v != v ? bits | 0x400000 : normal);
#endif
}

// The same, but what is above 0 stays above 0.
inline Vec<uint32_t> bfloat16_bits(Vec<float> v) {
  Vec<uint32_t> bits;
  std::memcpy(&bits, &v, sizeof v);
  const Vec<uint32_t> upper = bits >> 16, nearest = (bits + 0x7fff + (upper & 1)) >> 16;
  const Vec<uint32_t> positive = (nearest == 0) & (bits != 0) ? nearest + 1 : nearest;
  return v != v ? upper | 0x40 : positive;
}

inline void store_bits(BFloat16* p, Vec<uint32_t> upper) {
  const Halves halves = __builtin_convertvector(upper, Halves);
  std::memcpy(p, &halves, sizeof halves);
}

template <class T>
inline void store_numbers(T* p, Factors<T> v) {
  store<T>(p, v);
}
inline void store_numbers(BFloat16* p, Vec<float> v) {
  const Halves halves = nearest(v);
  std::memcpy(p, &halves, sizeof halves);
}

// Stores center, radius and nominal, `stride` apart. In bfloat16 center > radius stays so: where
// they round to the same, the radius takes the next number below, since the center might have none
// above but infinity.
template <class T>
inline void store_streams(T* p, int64_t stride, const Factors<T>* streams) {
#pragma GCC unroll 3
  for (int k = 0; k < 3; ++k) store<T>(p + k * stride, streams[k]);
}
inline void store_streams(BFloat16* p, int64_t stride, const Vec<float>* streams) {
  const Vec<uint32_t> center = bfloat16_bits(streams[0]), radius = bfloat16_bits(streams[1]);
  store_bits(p, center);
  const auto same = (streams[0] > streams[1]) & (streams[1] >= 0) & (center == radius);
  store_bits(p + stride, same ? radius - 1 : radius);  // -0, which points may be, has none below
  store_bits(p + 2 * stride, bfloat16_bits(streams[2]));
}

// Factors of products: see vec.h.

inline Vec<uint32_t> broadcast(Pair x) { return broadcast(x.bits); }

// The bits of a vector of factors that |.| keeps; where `signs` are to stay, all.
template <class F>
inline Vec<Bits<Number<F>>> kept_bits(bool signs) {
  using I = Bits<Number<F>>;
  constexpr I top = I{1} << (8 * sizeof(I) - 1), magnitude = ~top;
  constexpr I both = std::is_same_v<F, Pair> ? static_cast<I>(0x7fff7fff) : magnitude;
  return broadcast<I>(signs ? ~I{0} : both);
}

template <class F>
inline Factors<F> masked(Factors<F> v, Vec<Bits<Number<F>>> kept) {
  Vec<Bits<Number<F>>> bits;
  std::memcpy(&bits, &v, sizeof v);
  bits &= kept;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

template <class V>
inline V multiply_add(V sum, V a, V b) {
  return sum + a * b;
}

// sum + the products of the upper numbers + those of the lower ones: two roundings to nearest, and
// what is subnormal counts as 0.
#ifdef __AVX512BF16__
inline Vec<float> multiply_add(Vec<float> sum, Vec<uint32_t> a, Vec<uint32_t> b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#else
inline Vec<float> multiply_add(Vec<float> sum, Vec<uint32_t> a, Vec<uint32_t> b) {
  const auto normal = [](Vec<uint32_t> bits) {
    return as_float((bits & 0x7f800000) == 0 ? bits & 0x80000000 : bits);
  };
  const auto flushed = [&](Vec<float> v) {
    Vec<uint32_t> bits;
    std::memcpy(&bits, &v, sizeof v);
    return normal(bits);
  };
  sum = flushed(flushed(sum) + normal(a & 0xffff0000) * normal(b & 0xffff0000));
  return flushed(sum + normal(a << 16) * normal(b << 16));
}
#endif

// Packed numbers, or the memory that holds factors of them, as factors.
template <class E, class T>
const Factor<E>* as_factors(const T* p) {
  return reinterpret_cast<const Factor<E>*>(p);
}

// Pairs of `lower` and `upper`, lane by lane.
inline Vec<uint32_t> paired(Halves lower, Halves upper) {
  return __builtin_convertvector(lower, Vec<uint32_t>) |
         __builtin_convertvector(upper, Vec<uint32_t>) << 16;
}
inline Vec<uint32_t> paired(Vec<float> lower, Vec<float> upper) {
  return paired(nearest(lower), nearest(upper));
}

// `count` rows of n numbers as rows of pairs, of each two rows; an odd last row gets zeros.
inline void pair_rows(const float* rows, int64_t count, int64_t n, Pair* to) {
  for (int64_t i = 0; i < count; i += 2, rows += 2 * n, to += n)
    for (int64_t v = 0; v < n; v += kLanes<float>) {
      const Vec<float> upper = i + 1 < count ? load(rows + n + v) : Vec<float>{};
      store(to + v, paired(load(rows + v), upper));
    }
}

}  // namespace cibp
