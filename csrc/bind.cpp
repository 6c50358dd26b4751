// The Python extension: a list of what csrc offers, nothing else.
#include <pybind11/pybind11.h>

#include "stream/binding.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled merge kernels and the tile pipeline; used through pymerge.backends.native.";
  pm::bind_stream(m);
  pm::bind_cpu(m);
}
