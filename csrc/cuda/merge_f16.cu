#include "merge.cuh"

template void pm::cuda::merge<pm::F16>(const Request&);
