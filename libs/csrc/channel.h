// The numbers that batch norm multiplies a channel's elements by and adds to them, forward and backward, once for all
// devices. Included in the namespace of its code.

#ifdef __CUDACC__
#define CCNET_ANYWHERE __host__ __device__ __forceinline__
#else
#define CCNET_ANYWHERE
#endif

// Of a channel: the normaliser (abn.cpp), |weight| + eps and bias.
//   y = (x - mean) * scale() + offset()
// Taking off the mean first, as it is rounded to Real, loses nothing where x is near it; what the rounding left out, rest,
// is in the offset.
template <class Real>
struct Channel {
  Real mean, rest, inverse_deviation, share, gain, bias;
  CCNET_ANYWHERE Real shift(bool keeps_x) const { return keeps_x ? mean : bias; }  // deviations are from it
  CCNET_ANYWHERE Real scale() const { return gain * inverse_deviation; }
  CCNET_ANYWHERE Real offset() const { return bias - rest * scale(); }
};

// The backward pass has for each element its deviation: x - mean where x is kept, and else y - bias.
//   dx = (dy - share * sum(dy) - xhat * share * sum(dy * xhat)) * scale = dy * scale + deviation * of_deviation + constant
template <class Real>
struct ChannelGradient {
  Real of_deviation, constant;
  Real of_weight;  // sum(dy * xhat), which is the gradient of |weight|
  // From the sums of dy and dy * deviation
  CCNET_ANYWHERE ChannelGradient(const Channel<Real>& channel, bool has_x, Real sum, Real deviation_sum) {
    // xhat = (deviation - rest) * factor
    const Real rest = has_x ? channel.rest : 0, factor = has_x ? channel.inverse_deviation : 1 / channel.gain;
    of_weight = (deviation_sum - rest * sum) * factor;
    of_deviation = -channel.scale() * channel.share * of_weight * factor;
    constant = -channel.scale() * channel.share * sum - of_deviation * rest;
  }
};

#undef CCNET_ANYWHERE
