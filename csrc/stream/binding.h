// What the Python extension offers of the pipeline and of the processor.
#pragma once
#include <pybind11/pybind11.h>

namespace pm {

void bind_stream(pybind11::module_& m);
void bind_cpu(pybind11::module_& m);

}  // namespace pm
