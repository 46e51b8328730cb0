// Asynchronous copies and multiplications of a warpgroup (sm_90a), as functions of a block. Those
// of the tests do them at once, on the host (tests/csrc/cuda_shim.h).
#pragma once

#include "precision.h"

#ifdef __CUDACC__

namespace cibp::cuda {

CIBP_DEVICE uint32_t shared_address(DeviceBlock&, const float*, const char* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes, or zeros.
CIBP_DEVICE void copy16(DeviceBlock&, char* to, const void* from, bool any) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(any ? 16 : 0)
               : "memory");
}

CIBP_DEVICE void end_copies(DeviceBlock&) { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all copies, or all but those of the last end_copies, are seen by multiplications.
CIBP_DEVICE void await_copies(DeviceBlock&, bool but_last) {
  if (but_last)
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  else
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

CIBP_DEVICE void begin_multiply(DeviceBlock&) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

CIBP_DEVICE void end_multiply(DeviceBlock&) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until all multiplications, or all but those of the last end_multiply, are done.
CIBP_DEVICE void await_multiply(DeviceBlock&, bool but_last) {
  if (but_last)
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
  else
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// d += a * b: 64 x 64 results of SHAPE and types; the 1s are factors of a and b, and b is K-major.
#define CIBP_WGMMA(SHAPE, MAJOR)                                                                   \
  asm volatile(                                                                                    \
      "{.reg .pred add; setp.ne.b32 add, 1, 0;"                                                    \
      "wgmma.mma_async.sync.aligned." SHAPE                                                        \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                   \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "          \
      "{%32, %33, %34, %35}, %36, add, 1, 1" MAJOR ";}"                                            \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),        \
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),    \
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), \
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

CIBP_DEVICE void wgmma(float, float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  CIBP_WGMMA("m64n64k8.f32.tf32.tf32", "");
}
CIBP_DEVICE void wgmma(BFloat16, float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  CIBP_WGMMA("m64n64k16.f32.bf16.bf16", ", 0");
}
#undef CIBP_WGMMA

// Keeps the compiler from reading a sum before the await_multiply above: it takes the instruction
// that began the multiplication for its end.
CIBP_DEVICE void settle(float (&d)[32]) {
  CIBP_UNROLL
  for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The warpgroups of a block, each with sum(thread) += fragment(thread) * what descriptor(thread)
// describes.
template <class T, class Sum, class Fragment, class Descriptor>
CIBP_DEVICE void multiply(DeviceBlock&, T type, const Sum& sum, const Fragment& fragment,
                          const Descriptor& descriptor, const float*) {
  const int thread = static_cast<int>(threadIdx.x);
  wgmma(type, sum(thread), fragment(thread), descriptor(thread));
}

}  // namespace cibp::cuda

#endif
