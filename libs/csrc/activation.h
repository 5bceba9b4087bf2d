// Which activation follows batch norm. What they compute is in activation_functions.h.
#pragma once

namespace ccnet {

enum class Activation { identity, leaky_relu, elu };

struct ActivationOf {
  Activation name;
  double slope;  // of leaky_relu
};

}  // namespace ccnet
