// Elect: the sign that carries more total mass wins (TIES-Merging, section 3, step 2).
#pragma once
#include "dtype.h"

namespace pm {

// The sign bit of the summed mass; a sum that starts at +0 is never -0, so zero mass elects plus.
template <class V>
PM_HD V elect(V mass) {
  return sign_bit(mass);
}

// An entry agrees if it is not zero and bears the elected sign.
template <class V>
PM_HD typename V::Mask agrees(V entry, V side) {
  return is_positive(flip_sign(entry, side));
}

}  // namespace pm
