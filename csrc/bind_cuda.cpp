// The Python extension of the device kernels: tensors, workspace and stream cross as numbers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/merge.h"

namespace py = pybind11;

namespace {

pm::cuda::Request make_request(const py::dict& d) {
  pm::cuda::Request r;
  r.group.table = reinterpret_cast<const int64_t*>(d["table"].cast<uintptr_t>());
  r.group.tensors = d["tensors"].cast<int64_t>();
  r.group.size = d["size"].cast<int64_t>();
  r.group.piece = d["piece"].cast<int64_t>();
  r.group.pieces = d["pieces"].cast<int64_t>();
  r.group.blocks = d["blocks"].cast<int64_t>();
  r.base = d["task_vector"].cast<bool>();
  r.elect = d["elect"].cast<bool>();
  r.normalize = d["normalize"].cast<bool>();
  r.rescale = d["rescale"].cast<bool>();
  r.all_ties = d["all_ties"].cast<bool>();
  r.own_cuts = d["own_cuts"].cast<bool>();
  r.trim = pm::Trim(d["trim"].cast<int>());
  r.lambda = d["lambda"].cast<double>();
  r.weight = d["weights"].cast<std::vector<double>>();
  r.late = d["late_weights"].cast<std::vector<double>>();
  r.density = d["densities"].cast<std::vector<double>>();
  r.gamma = d["gammas"].cast<std::vector<double>>();
  r.group.experts = int(r.weight.size());
  r.workspace = reinterpret_cast<void*>(d["workspace"].cast<uintptr_t>());
  r.samples = d["samples"].cast<int64_t>();
  r.capacity = d["capacity"].cast<int64_t>();
  r.sigmas = d["sigmas"].cast<double>();
  r.bias = d["bias"].cast<double>();
#if defined(PM_CUDA)
  r.stream = reinterpret_cast<pm::cuda::Stream>(d["stream"].cast<uintptr_t>());
#else
  r.stream.seed = d["stream"].cast<uint64_t>();
#endif
  if (r.group.experts > pm::cuda::kMaxExperts || r.density.size() != r.weight.size())
    throw std::invalid_argument("more experts than a kernel takes, or not one density for each");
  if (!r.late.empty() && r.late.size() != r.weight.size())
    throw std::invalid_argument("not one late weight for each expert");
  if (r.trim == pm::Trim::outliers && r.gamma.size() != r.weight.size())
    throw std::invalid_argument("not one gamma for each expert");
  return r;
}

// Calls body with the element type of that number.
template <class F>
void with_type(int dtype, F&& body) {
  switch (pm::DType(dtype)) {
    case pm::DType::bf16: return body(pm::BF16{});
#if !defined(PM_BF16_ONLY)  // sanitizers take minutes for each type
    case pm::DType::f16: return body(pm::F16{});
    case pm::DType::f32: return body(pm::F32{});
#endif
    default: throw std::invalid_argument("no kernel for this element type");
  }
}

void merge(int dtype, const py::dict& given) {
  const pm::cuda::Request request = make_request(given);
  py::gil_scoped_release released;
  with_type(dtype, [&]<class T>(T) { pm::cuda::merge<T>(request); });
}

void check(int dtype, const py::dict& given) {
  const pm::cuda::Request request = make_request(given);
  py::gil_scoped_release released;
  with_type(dtype, [&]<class T>(T) { pm::cuda::check<T>(request); });
}

}  // namespace

PYBIND11_MODULE(PM_CUDA_MODULE, m) {
  m.doc() = "Device kernels; used through pymerge.backends.cuda.";
  m.def("merge", &merge);
  m.def("check", &check);
  m.def("workspace_bytes",
        [](const py::dict& given) { return pm::cuda::workspace_bytes(make_request(given)); });
  m.attr("most_experts") = pm::cuda::kMaxExperts;
  m.attr("reduce_block") = pm::cuda::kReduceBlock;
  m.attr("columns") = int(pm::cuda::kExperts);
#if defined(PM_CUDA)
  m.attr("on_device") = true;
#else
  m.attr("on_device") = false;
  m.def("skip_barriers", [](bool skip) { fiber::machine.skip_barriers = skip; });
  m.def("refuse_kernels", [](bool refuse) { fiber::machine.refuses = refuse; });
#endif
}
