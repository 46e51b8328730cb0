// Networks of bfloat16 numbers. This file alone is compiled anew for AVX512_BF16 (setup.py).
#include "backward.h"
#include "forward.h"
#include "graph_backward.h"
#include "graph_forward.h"
#include "graph_plan.h"
#include "planning.h"

namespace cibp {

template class Network<BFloat16>;
template class Graph<BFloat16>;

}  // namespace cibp
