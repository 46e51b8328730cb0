// Networks of double numbers.
#include "backward.h"
#include "forward.h"
#include "graph_backward.h"
#include "graph_forward.h"
#include "graph_plan.h"
#include "planning.h"

namespace cibp {

template class Network<double>;
template class Graph<double>;

}  // namespace cibp
