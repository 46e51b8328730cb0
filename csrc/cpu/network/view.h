// Values of a graph as they are read: behind batch norm and an activation.
//
// A value lies example by example, [row][stream][column][channel], without padding, as center,
// radius and nominal (mu, r, nominal). After an activation they are (m, r, nominal) as in layers.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../vec.h"
#include "activation.h"
#include "graph_plan.h"
#include "layers.h"
#include "moments.h"

namespace cibp {

// What a batch norm makes of a value: (x - mean) scale + shift for each channel, padded by zeros. A
// radius is multiplied by spread, |scale| or, of a channel that a shift of -infinity masks, 0.
template <class T>
struct Norm {
  std::vector<T> mean, scale, spread, shift;
};

// Sums over gradients by a norm's output, of each channel, that the gradient by its input needs:
// of those by center and nominal point, of their products with the deviations from the mean, and of
// those by the radius with it. They are added up in double from time to time.
template <class T>
class NormSums {
 public:
  explicit NormSums(int64_t padded)
      : near_(static_cast<size_t>(kKinds * padded)),
        all_(static_cast<size_t>(kKinds * padded)),
        padded_(padded) {}

  // value: of the norm's input.
  [[gnu::always_inline]] void add(Vec<T> mean, int64_t channel, const Vec<T>* value,
                                  const Vec<T>* gradient) {
    T* const p = &near_[static_cast<size_t>(channel)];
    const auto add_at = [](T* to, Vec<T> x) { store<T>(to, load(to) + x); };
    add_at(p, gradient[0] + gradient[2]);
    add_at(p + padded_, gradient[0] * (value[0] - mean) + gradient[2] * (value[2] - mean));
    add_at(p + 2 * padded_, gradient[1] * value[1]);
  }

  void add_up() {
    for (size_t i = 0; i < all_.size(); ++i) all_[i] += static_cast<double>(near_[i]);
    std::fill(near_.begin(), near_.end(), T{0});
  }

  double ones(int64_t c) const { return all_[static_cast<size_t>(c)]; }
  double deviations(int64_t c) const { return all_[static_cast<size_t>(padded_ + c)]; }
  double radii(int64_t c) const { return all_[static_cast<size_t>(2 * padded_ + c)]; }

 private:
  static constexpr int64_t kKinds = 3;
  std::vector<T> near_;
  std::vector<double> all_;
  int64_t padded_;
};

template <class E>
struct View {
  const E* value;         // of the whole batch
  const Layer<E>* place;  // whose `in` is how it lies
  const Norm<Number<E>>* norm;
  Activation<Number<E>> activation;

  int64_t size() const { return place->in.size(); }
  int64_t stride() const { return place->in.stream_stride(); }
};

// The norm of one vector of streams, in place.
template <class T>
[[gnu::always_inline]] inline void normalize(const Norm<T>& norm, int64_t channel,
                                             Vec<T>* streams) {
  const Vec<T> mean = load(&norm.mean[static_cast<size_t>(channel)]),
               scale = load(&norm.scale[static_cast<size_t>(channel)]),
               shift = load(&norm.shift[static_cast<size_t>(channel)]);
  streams[0] = (streams[0] - mean) * scale + shift;
  streams[1] *= load(&norm.spread[static_cast<size_t>(channel)]);
  streams[2] = (streams[2] - mean) * scale + shift;
}

// The streams of a value, at a place of its data, behind its norm.
template <class E>
[[gnu::always_inline]] inline void load_value(const View<E>& view, const E* from, int64_t channel,
                                              Vec<Number<E>>* streams) {
  load_streams(from, view.stride(), streams);
  if (view.norm) normalize<Number<E>>(*view.norm, channel, streams);
}

// body(place in the data of an example, pixel, channel) for each vector of a value's channels.
template <class E, class Body>
void for_vectors(const Layer<E>& place, const Body& body) {
  for (size_t p = 0; p < place.in_offsets.size(); ++p)
    for (int64_t c = 0; c < place.in.pitch; c += kLanes<E>)
      body(place.in_offsets[p] + c, static_cast<int64_t>(p), c);
}

// Sums over what is read, of each lane; of the moments only where they are wanted.
template <class T>
struct Seen {
  bool wants_moments;
  Vec<T> normed{}, activated{};  // r^2 behind the norm, and behind the activation
  Vec<T> moments[kMoments] = {};
};

// The same of all lanes.
struct Totals {
  double normed = 0, activated = 0, moments[kMoments] = {};

  template <class T>
  void add(const Seen<T>& seen) {
    normed += static_cast<double>(sum<T>(seen.normed));
    activated += static_cast<double>(sum<T>(seen.activated));
    for (int k = 0; seen.wants_moments && k < kMoments; ++k)
      moments[k] += static_cast<double>(sum<T>(seen.moments[k]));
  }
};

// Zeros from a lane on. The channels by which a value is padded need not be 0: some curves move 0,
// and what is infinite makes NaN of the zeros that pad weights.
template <class T>
[[gnu::always_inline]] inline void clear_from(int64_t count, Vec<T>* streams) {
  if (count >= kLanes<T>) return;
  Vec<Bits<T>> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  for (int k = 0; k < S; ++k)
    streams[k] = lane < static_cast<Bits<T>>(count) ? streams[k] : Vec<T>{};
}

// Reads one vector of an example's streams, behind norm and activation.
template <class E>
[[gnu::always_inline]] inline void read(const View<E>& view, const E* from, int64_t channel,
                                        Vec<Number<E>>* streams, Seen<Number<E>>& seen) {
  using T = Number<E>;
  load_value(view, from, channel, streams);
  seen.normed += streams[1] * streams[1];
  if (seen.wants_moments) add_moments<T>(streams, seen.moments);
  bend<T>(view.activation, streams);
  clear_from<T>(view.place->shape.out_channels - channel, streams);
  seen.activated += streams[1] * streams[1];
}

// The images that a node's layer reads, of `count` examples from n on.
template <class E>
void prepare(const View<E>& view, int64_t n, int64_t count, const NodePlan<E>& node, E* images,
             bool wants_moments, Totals& totals) {
  using T = Number<E>;
  const Layer<E>& layer = node.layer();
  const Geometry& g = layer.in;
  for (int64_t k = 0; k < count; ++k, images += g.size()) {
    if (!layer.dense) clear_padding(g, layer.shape.in_height, layer.shape.in_width, images);
    const E* const value = view.value + (n + k) * view.size();
    Seen<T> seen{wants_moments};
    for_vectors(*view.place, [&](int64_t from, int64_t pixel, int64_t channel) {
      Vec<T> streams[S];
      read(view, value + from, channel, streams, seen);
      // what weights make of infinite bounds is not known: NaN
      if (node.weighted()) streams[1] += streams[0] * T(0);
      store_streams(images + layer.in_offsets[static_cast<size_t>(pixel)] + channel,
                    g.stream_stride(), streams);
    });
    totals.add(seen);
  }
}

// Where the gradient of a value goes: by (mu, r, nominal) behind its norm, and as it lies.
template <class E>
struct ViewGradient {
  View<E> view;
  E* data;
  bool filled;  // whether there is something, to which this is added
  // of r in the gradients of the widths behind norm and activation
  Number<E> normed{}, activated{};
  std::optional<MomentGradient<Number<E>>> moments{};
};

// Takes the gradient of what was read, of one vector of example n; `from`: its place in the data.
// sums: where those of a norm are added up, or null.
template <class E>
[[gnu::always_inline]] inline void take(const ViewGradient<E>& to, int64_t n, int64_t from,
                                        int64_t channel, Vec<Number<E>>* gradient,
                                        NormSums<Number<E>>* sums) {
  using T = Number<E>;
  const int64_t at = n * to.view.size() + from;
  if (!to.view.activation.none() || to.normed != 0) {
    Vec<T> before[S], after[S];
    load_value(to.view, to.view.value + at, channel, before);
    for (int k = 0; k < S; ++k) after[k] = before[k];
    bend<T>(to.view.activation, after);
    gradient[1] += to.activated * after[1];
    unbend<T>(to.view.activation, before, gradient);
    gradient[1] += to.normed * before[1];
    if (to.moments) to.moments->add_to(channel, before, gradient);
  }
  E* const out = to.data + at;
  for (int k = 0; k < S; ++k) {
    E* const p = out + k * to.view.stride();
    const E* const there = p;
    if (to.filled) gradient[k] += numbers(there);
    store_numbers(p, gradient[k]);
  }
  if (sums) {
    Vec<T> value[S];
    load_streams(to.view.value + at, to.view.stride(), value);
    sums->add(load(&to.view.norm->mean[static_cast<size_t>(channel)]), channel, value, gradient);
  }
}

}  // namespace cibp
