// Which activation follows batch norm. What they compute is in activation_functions.h.
#pragma once

namespace ccnet {

enum class Activation { identity, leaky_relu, elu, relu };

struct ActivationOf {
  Activation name;
  double slope;  // of leaky_relu
  // Where it cannot be inverted, the backward pass is given x.
  bool is_invertible() const { return name != Activation::relu; }
};

}  // namespace ccnet
