// Networks of float numbers.
#include "backward.h"
#include "forward.h"
#include "planning.h"

namespace cibp {

template class Network<float>;

}  // namespace cibp
