// Networks of bfloat16 numbers. This file alone is compiled anew for AVX512_BF16 (setup.py).
#include "backward.h"
#include "forward.h"
#include "planning.h"

namespace cibp {

template class Network<BFloat16>;

}  // namespace cibp
