// The kernels at width 1: the same text on any processor, and all of f64.
#include "instantiate.h"

namespace pm {

const IsaKernels& scalar_kernels() {
  static const IsaKernels kernels = make_isa_kernels<Scalar<float>>();
  return kernels;
}

const KernelSet<double>& double_kernels() {
  static const KernelSet<double> kernels = make_kernel_set<Scalar<double>, F64>();
  return kernels;
}

}  // namespace pm
