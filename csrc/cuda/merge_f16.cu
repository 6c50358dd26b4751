#include "merge.cuh"

template void pm::cuda::merge<pm::F16>(const Request&);
template void pm::cuda::check<pm::F16>(const Request&);
