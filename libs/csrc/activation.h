// Which activation follows batch norm. What they compute is in activation_functions.h.
#pragma once

namespace ccnet {

enum class Activation { identity, leaky_relu, elu };

}  // namespace ccnet
