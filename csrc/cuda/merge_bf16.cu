#include "merge.cuh"

template void pm::cuda::merge<pm::BF16>(const Request&);
template void pm::cuda::check<pm::BF16>(const Request&);
