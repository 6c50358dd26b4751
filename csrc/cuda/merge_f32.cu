#include "merge.cuh"

template void pm::cuda::merge<pm::F32>(const Request&);
template void pm::cuda::check<pm::F32>(const Request&);
