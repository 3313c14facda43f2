// The steps of attention, for the vectors of whoever includes this (attend.cpp) in a namespace of its own: `vec` of W floats,
// what is done with it, and the target TARGET. There is no other way to have one text for several instruction sets.

// M rows of q meet the keys that `live` names: out[m · CHUNK + j] = q[m] · key[live[j]]. The first to pass over them has
// `values`, and asks for keys some rows ahead and for the values, which come next.
template <int KIND, int M>
TARGET static void scores(const float* q, i64 width, const Rows& keys, const Rows* values, const i32* live, i64 count,
                          float* out) {
  const i64 ahead = AHEAD / keys.bytes + 1;
  for (i64 j = 0; j < count; j++) {
    const u8* key = keys.at + live[j] * keys.stride;
    if (values) {
      if (j + ahead < count) ask_row(keys, live[j + ahead]);
      ask_row(*values, live[j]);
    }
    vec sum[M];
    UNROLL for (int m = 0; m < M; m++) sum[m] = all(0.0f);
    for (i64 d = 0; d < width; d += W) {
      const vec part = take<KIND>(key, d);
      UNROLL for (int m = 0; m < M; m++) sum[m] = fma(part, take<F32>(q + m * width, d), sum[m]);
    }
    UNROLL for (int m = 0; m < M; m++) out[m * CHUNK + j] = total(sum[m]);
  }
}

// B vectors of the weighted sum of values, from column `d` on, of M rows of weights.
template <int KIND, int M, int B>
TARGET INLINE void columns(const float* weights, const Rows& values, const i32* live, i64 count, float* out, i64 width,
                           i64 d) {
  vec sum[M][B];
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int b = 0; b < B; b++) sum[m][b] = all(0.0f);
  for (i64 j = 0; j < count; j++) {
    const u8* value = values.at + live[j] * values.stride;
    vec part[B];
    UNROLL for (int b = 0; b < B; b++) part[b] = take<KIND>(value, d + b * W);
    UNROLL for (int m = 0; m < M; m++) {
      const vec weight = all(weights[m * CHUNK + j]);
      UNROLL for (int b = 0; b < B; b++) sum[m][b] = fma(part[b], weight, sum[m][b]);
    }
  }
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int b = 0; b < B; b++) put(out + m * width + d + b * W, sum[m][b]);
}

template <int KIND, int M>
TARGET static void weighted(const float* weights, const Rows& values, const i32* live, i64 count, float* out, i64 width) {
  i64 d = 0;
  for (; d + 4 * W <= width && W > 8; d += 4 * W) columns<KIND, M, 4>(weights, values, live, count, out, width, d);
  for (; d + 2 * W <= width; d += 2 * W) columns<KIND, M, 2>(weights, values, live, count, out, width, d);
  for (; d < width; d += W) columns<KIND, M, 1>(weights, values, live, count, out, width, d);
}

// e to the power of numbers that are not above 0, as near as float has it; below -87 it is 0, and of NaN NaN.
TARGET INLINE vec power(vec x) {
  const vec kept = most(all(-87.0f), x), n = nearest(mul(kept, all(1.44269504f)));
  const vec r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), kept));
  vec p = all(1.98756915e-4f);
  p = fma(p, r, all(1.39819995e-3f));
  p = fma(p, r, all(8.33345191e-3f));
  p = fma(p, r, all(4.16657960e-2f));
  p = fma(p, r, all(1.66666654e-1f));
  p = fma(p, r, all(0.5f));
  p = fma(mul(r, r), p, fma(r, all(1.0f), all(1.0f)));
  return zero_below(x, all(-87.0f), twice(p, n));
}

// Scores become weights, exp(score - the highest); returns the highest, and their sum in `sum`. No weight where all is -inf.
TARGET static float weigh(float* score, i64 count, float* sum) {
  const i64 padded = (count + W - 1) / W * W;
  for (i64 j = count; j < padded; j++) score[j] = -INFINITY;
  vec high = all(-INFINITY), added = all(0.0f);
  for (i64 j = 0; j < padded; j += W) high = most(high, take<F32>(score, j));
  const float top = highest(high);
  if (top == -INFINITY) high = all(0.0f);   // exp(-inf - 0) is 0; NaN stays
  else high = all(top);
  for (i64 j = 0; j < padded; j += W) {
    const vec weight = power(sub(take<F32>(score, j), high));
    added = add(added, weight);
    put(score + j, weight);
  }
  *sum = total(added);
  return top;
}

// One chunk of positions of one head of keys and values: unscaled sums, and of each query the highest score and the weights' sum.
template <int KIND>
TARGET static void chunk(const Attention& a, i64 sequence, i64 head, i64 from, i64 to, float* scratch, float* out, float* top,
                         float* sum) {
  float* q = scratch;
  float* score = q + a.group * a.width;
  i32* live = (i32*)(score + a.group * CHUNK);
  const i64 size = KIND == F32 ? 4 : 2, count = live_positions(a, sequence, head, from, to, live);
  for (i64 g = 0; g < a.group; g++) {
    const u8* row = a.q + (sequence * a.of_q[0] + (head * a.group + g) * a.of_q[1]) * size;
    for (i64 d = 0; d < a.width; d++) q[g * a.width + d] = load(KIND, row, d) * a.scale;
  }
  const Rows keys{a.k + (sequence * a.of_k[0] + head * a.of_k[1]) * size, a.of_k[2] * size, a.width * size};
  const Rows values{a.v + (sequence * a.of_v[0] + head * a.of_v[1]) * size, a.of_v[2] * size, a.value_width * size};
#define SCORES(M) [&](i64 g) TARGET { \
    scores<KIND, M>(q + g * a.width, a.width, keys, g ? nullptr : &values, live, count, score + g * CHUNK); }
  in_fours(a.group, SCORES(4), SCORES(2), SCORES(1));
#undef SCORES
  for (i64 g = 0; g < a.group; g++) {
    add_mask(a, sequence, head * a.group + g, live, count, score + g * CHUNK);
    top[g] = weigh(score + g * CHUNK, count, sum + g);
  }
  const i64 width = a.value_width;
#define WEIGHTED(M) [&](i64 g) TARGET { weighted<KIND, M>(score + g * CHUNK, values, live, count, out + g * width, width); }
  in_fours(a.group, WEIGHTED(4), WEIGHTED(2), WEIGHTED(1));
#undef WEIGHTED
}
