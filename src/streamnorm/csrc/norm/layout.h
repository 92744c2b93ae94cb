// From a view and a tensor's strides to where the elements of each statistic are.

#pragma once

#include <cstdint>

#include "common/dlpack.h"

namespace {

// Where the elements of a statistic are. Runs: statistic g = (g1, g2) owns A runs of B contiguous elements, at
// a·sa + g1·sg1 + g2·sg2. Rows: statistic g = (g1, c) is a column of A blocks of B rows, at g1·sg1 + a·sa + b·sb + c.
// Element b of a run belongs to channel (g mod C/Bc)·Bc + b / S.
struct Layout {
  bool rows;
  int64_t A, sa, G1, sg1, G2, sg2, B, sb;
  int64_t G, C, Bc, S;
  int64_t inside;  // elements from a channel to the next
  // Where a mask over the input without its channels, in the order of memory, has the element at `offset`.
  int64_t place(int64_t offset) const { return offset / (C * inside) * inside + offset % inside; }
};

constexpr int max_axes = DLTensor::most_axes;

// An input's shape, with axes split and in part kept: core/spec.py says what that means.
struct View {
  int axes, dims;
  int64_t size[max_axes];
  int origin[max_axes];
  bool kept[max_axes];
  int64_t numel, samples, channels, n, G;
};

struct Axis {
  int64_t size, stride;
  int place;  // in the view
  bool kept, channel;
  int64_t channels, inner;  // of a merged block: channels in it, elements behind each
};

// Memory order, outermost first; neighbours merged where they can be stepped through as one.
int merge(const View& view, const int64_t* strides, Axis* blocks) {
  Axis part[max_axes];
  int count = 0, axis = -1;
  int64_t step = 0;
  for (int i = view.axes - 1; i >= 0; i--) {
    if (view.origin[i] != axis) axis = view.origin[i], step = strides[axis];
    bool channel = axis == 1;
    if (view.size[i] > 1) part[count++] = {view.size[i], step, i, view.kept[i], channel, channel ? view.size[i] : 1, channel ? 1 : view.size[i]};
    step *= view.size[i];
  }
  for (int i = 1; i < count; i++)  // sort by stride, smallest first; equal strides do not occur in what is accepted
    for (int j = i; j > 0 && part[j].stride < part[j - 1].stride; j--) {
      Axis swap = part[j];
      part[j] = part[j - 1];
      part[j - 1] = swap;
    }
  int merged = 0;
  for (int i = 0; i < count; i++) {
    Axis& outer = part[i];
    Axis* inner = merged ? &blocks[merged - 1] : nullptr;
    bool fits = inner && outer.stride == inner->stride * inner->size && outer.kept == inner->kept && outer.place < inner->place;
    // A block holds at most one stretch of channels, outermost: outer places never join channels inside.
    if (fits && (outer.channel || !inner->channel) && !(outer.kept && outer.channel != inner->channel)) {
      inner->size *= outer.size;
      inner->place = outer.place;
      if (outer.channel) inner->channels *= outer.size;
      else inner->inner *= outer.size;
      inner->channel = inner->channel || outer.channel;
    } else {
      blocks[merged++] = outer;
    }
  }
  for (int i = 0; i < merged / 2; i++) {
    Axis swap = blocks[i];
    blocks[i] = blocks[merged - 1 - i];
    blocks[merged - 1 - i] = swap;
  }
  return merged;
}

bool make_layout(const View& view, const int64_t* strides, Layout& out) {
  Axis block[max_axes];
  int count = merge(view, strides, block);
  for (int i = 0; i < count; i++) {
    if (block[i].stride <= 0) return false;
    // An output has no gaps between its elements, and the input's strides: so the input has none either.
    if (i + 1 < count && block[i].stride != block[i + 1].stride * block[i + 1].size) return false;
  }

  // g counts the kept axes in the order of the view, and its channels last: memory must agree.
  int last_kept = -1;
  bool channel_kept = false, channel_reduced = false;
  for (int i = 0; i < count; i++) {
    if (!block[i].kept) {
      channel_reduced = channel_reduced || block[i].channel;
      continue;
    }
    if (block[i].place < last_kept || (channel_kept && !block[i].channel)) return false;
    last_kept = block[i].place;
    channel_kept = channel_kept || block[i].channel;
  }
  for (int i = 0; i < view.axes; i++)  // of split channels, the outer ones are kept
    for (int j = i + 1; j < view.axes; j++)
      if (view.origin[i] == 1 && view.origin[j] == 1 && view.size[i] > 1 && view.size[j] > 1 && !view.kept[i] && view.kept[j]) return false;

  Layout l = {};
  l.A = l.G1 = l.G2 = l.B = l.sb = 1;
  l.C = view.channels;
  l.G = view.G;
  l.inside = view.channels > 1 ? strides[1] : view.numel;
  Axis* inner = count ? &block[count - 1] : nullptr;
  if (inner && inner->stride != 1) return false;
  l.rows = !inner || (inner->kept && inner->channel);
  if (inner && inner->kept && !inner->channel) return false;
  Axis *reduced[2] = {}, *kept[2] = {};
  int num_reduced = 0, num_kept = 0;
  for (int i = 0; i + 1 < count; i++) {
    int& found = block[i].kept ? num_kept : num_reduced;
    if (found == 2) return false;
    (block[i].kept ? kept : reduced)[found++] = &block[i];
  }
  if (l.rows) {
    if (num_kept > 1 || channel_reduced || (inner && inner->size != l.C)) return false;
    if (num_kept) l.G1 = kept[0]->size, l.sg1 = kept[0]->stride;
    Axis *a = num_reduced == 2 ? reduced[0] : nullptr, *b = num_reduced ? reduced[num_reduced - 1] : nullptr;
    if (a) l.A = a->size, l.sa = a->stride;
    if (b) l.B = b->size, l.sb = b->stride;
    l.Bc = l.S = 1;
  } else {
    if (num_reduced > 1 || (channel_reduced && !inner->channel)) return false;
    if (num_reduced) l.A = reduced[0]->size, l.sa = reduced[0]->stride;
    Axis *g1 = num_kept == 2 ? kept[0] : nullptr, *g2 = num_kept ? kept[num_kept - 1] : nullptr;
    if (g1) l.G1 = g1->size, l.sg1 = g1->stride;
    if (g2) l.G2 = g2->size, l.sg2 = g2->stride;
    l.B = inner->size;
    l.Bc = inner->channel ? inner->channels : 1;
    l.S = l.B / l.Bc;
  }
  out = l;
  return true;
}

}  // namespace
