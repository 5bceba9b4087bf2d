// The activations that follow batch norm, once for all devices: V is a number or, in the CPU's kernels, a vector of them,
// and Real the type of a number.
//
// Every activation is increasing, so z = f(y) tells the derivative at y and, unless f is relu, y:
//   y = f.inverse(z), dy = f.gradient(z, dz)
//
// Included in the namespace of its code: by the CPU's kernels once per instruction set, as simd.h is and after it.
// expm1 and log1p are the including file's.

#ifdef __CUDACC__
#define CCNET_ANYWHERE __host__ __device__ __forceinline__
#define CCNET_WITH_ACTIVATION inline
#else
#define CCNET_ANYWHERE __attribute__((always_inline))
#define CCNET_WITH_ACTIVATION static inline __attribute__((always_inline))
#endif

// Of the type that z is stored in: the distance from 1 to the next larger number, and the largest number that is rounded
// to 0
struct Rounding {
  double epsilon, to_zero;
};

struct IdentityActivation {
  template <class V>
  CCNET_ANYWHERE V operator()(V y) const {
    return y;
  }
  template <class V>
  CCNET_ANYWHERE V inverse(V z) const {
    return z;
  }
  template <class V>
  CCNET_ANYWHERE V gradient(V z, V grad_z) const {
    return grad_z * (z - z + 1);  // NaN stays NaN
  }
};

template <class Real>
struct LeakyRelu {
  Real slope, inverse_slope;
  CCNET_ANYWHERE explicit LeakyRelu(double slope) : slope(slope), inverse_slope(1 / slope) {}

  template <class V>
  CCNET_ANYWHERE V operator()(V y) const {
    return y > V{} ? y : y * slope;
  }
  template <class V>
  CCNET_ANYWHERE V inverse(V z) const {
    return z > V{} ? z : z * inverse_slope;
  }
  template <class V>
  CCNET_ANYWHERE V gradient(V z, V grad_z) const {
    return z > V{} ? grad_z : grad_z * slope;
  }
};

// z + 1 = e^y is lost where z is rounded to -1; there y is taken to be that of the next larger z.
template <class Real>
struct Elu {
  Real least;
  CCNET_ANYWHERE explicit Elu(const Rounding& rounding) : least(rounding.epsilon / 2 - 1) {}

  template <class V>
  CCNET_ANYWHERE V operator()(V y) const {
    return y > V{} ? y : expm1(y);
  }
  template <class V>
  CCNET_ANYWHERE V inverse(V z) const {
    const V negative = z < V{} + least ? V{} + least : z;
    return z > V{} ? z : log1p(negative);
  }
  template <class V>
  CCNET_ANYWHERE V gradient(V z, V grad_z) const {
    return z > V{} ? grad_z : grad_z * (z + 1);
  }
};

// As PyTorch's: the gradient is 0 where z is, whatever that of z, and NaN stays NaN. y may be given for z.
template <class Real>
struct Relu {
  Real to_zero;
  CCNET_ANYWHERE explicit Relu(const Rounding& rounding) : to_zero(rounding.to_zero) {}

  template <class V>
  CCNET_ANYWHERE V operator()(V y) const {
    return y <= V{} ? V{} : y;
  }
  template <class V>
  CCNET_ANYWHERE V gradient(V z, V grad_z) const {
    return z <= V{} + to_zero ? V{} : grad_z;
  }
};

// f(the activation)
template <class Real, class F>
CCNET_WITH_ACTIVATION auto with_activation(const ActivationOf& activation, const Rounding& rounding, const F& f) {
  switch (activation.name) {
    case Activation::leaky_relu:
      return f(LeakyRelu<Real>(activation.slope));
    case Activation::elu:
      return f(Elu<Real>(rounding));
    case Activation::relu:
      return f(Relu<Real>(rounding));
    default:
      return f(IdentityActivation());
  }
}

#undef CCNET_ANYWHERE
#undef CCNET_WITH_ACTIVATION
