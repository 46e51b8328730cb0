// Networks of double numbers.
#include "backward.h"
#include "forward.h"
#include "planning.h"

namespace cibp {

template class Network<double>;

}  // namespace cibp
