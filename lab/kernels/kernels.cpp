// A multilayer perceptron whose weights are held as their stored values only: forward, and backward to inputs and values.
//
// Samples are cut into tiles of T. Inside a tile a neuron's T activations lie side by side, so that a stored weight is one
// scalar times a few vector registers, and a tile's activations stay in the cache through all layers. Every sum runs in a
// fixed order that the number of threads does not change.
//
// __init__.py beside it builds this file with the system's compiler for this processor and calls it through ctypes.
#include <algorithm>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

#if defined(__AVX512F__)
constexpr int W = 16, R = 4;
#elif defined(__AVX__)
constexpr int W = 8, R = 2;
#else
constexpr int W = 4, R = 2;
#endif
// W: floats in a vector; R: rows of a dense layer that share what is loaded (more did not gain on AVX-512)
constexpr int V = 4;  // vectors per tile row: with R rows, or two partial sums, enough to hide the latency
typedef float vector __attribute__((vector_size(W * sizeof(float))));

#define INLINE __attribute__((always_inline)) static inline

struct Layer {
    int64_t n_in, n_out, dense;                    // dense: every connection is stored
    int64_t input, output;                         // where they start in a tile of the workspace, in rows of T
    const int32_t *row_start, *column;             // the stored values of output o: row_start[o] to row_start[o + 1]
    const int32_t *column_start, *row, *position;  // the same by input, and where each one stands in the order above
    int64_t values, bias;                          // where they start among the network's parameters
};

// Adds to sum the values[k] * x[index[k]] of one sparse row, for one tile. Two partial sums hide the latency.
template <typename vec, int V>
INLINE void sparse_product(int32_t count, const int32_t *index, const float *values, const vec *x, vec *sum) {
    vec odd[V]{};
    int32_t k = 0;
    for (; k + 1 < count; k += 2) {
        const vec *a = x + (int64_t)index[k] * V, *b = x + (int64_t)index[k + 1] * V;
        for (int v = 0; v < V; v++) sum[v] += values[k] * a[v];
        for (int v = 0; v < V; v++) odd[v] += values[k + 1] * b[v];
    }
    for (; k < count; k++)
        for (int v = 0; v < V; v++) sum[v] += values[k] * x[(int64_t)index[k] * V + v];
    for (int v = 0; v < V; v++) sum[v] += odd[v];
}

// Adds to sum[r] the scalars[r * row_step + k * step] * x[k] of rows without gaps. `volatile` has every x loaded once into
// a register; GCC would read it again for each row, which takes a fifth longer.
template <typename vec, int V, int rows>
INLINE void dense_product(int64_t count, const float *scalars, int64_t row_step, int64_t step, const vec *x,
                          vec (*sum)[V]) {
    for (int64_t k = 0; k < count; k++) {
        vec x_k[V];
        for (int v = 0; v < V; v++) x_k[v] = *(const volatile vec *)(x + k * V + v);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < V; v++) sum[r][v] += scalars[r * row_step + k * step] * x_k[v];
    }
}

// Calls write(i, sum) with `bias[i]` (0 without) plus the product of each of the n rows of a sparse layer.
template <typename vec, int V, typename Write>
INLINE void sparse_products(int64_t n, const int32_t *start, const int32_t *index, const float *values,
                            const float *bias, const vec *x, Write write) {
    for (int64_t i = 0; i < n; i++) {
        vec sum[V];
        for (int v = 0; v < V; v++) sum[v] = vec{} + (bias ? bias[i] : 0.0f);
        sparse_product<vec, V>(start[i + 1] - start[i], index + start[i], values + start[i], x, sum);
        write(i, sum);
    }
}

// The same for a dense layer with `count` values a row, from row i on, R rows at a time and the last few by themselves.
template <typename vec, int V, int rows = R, typename Write>
INLINE void dense_products(int64_t n, int64_t count, const float *values, int64_t row_step, int64_t step,
                           const float *bias, const vec *x, Write write, int64_t i = 0) {
    for (; i + rows <= n; i += rows) {
        vec sum[rows][V];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < V; v++) sum[r][v] = vec{} + (bias ? bias[i + r] : 0.0f);
        dense_product<vec, V, rows>(count, values + i * row_step, row_step, step, x, sum);
        for (int r = 0; r < rows; r++) write(i + r, sum[r]);
    }
    if constexpr (rows > 1) dense_products<vec, V, 1>(n, count, values, row_step, step, bias, x, write, i);
}

static inline float total(float x) { return x; }
static inline float total(vector x) {
    typedef float quad __attribute__((vector_size(16)));
    quad part, sum{};
    for (int i = 0; i < W; i += 4) {
        __builtin_memcpy(&part, (const float *)&x + i, sizeof part);
        sum += part;
    }
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// Sets to[i * to_step + j] to from[j * from_step + i], for `columns` i and `rows` j, and to zero for j up to `filled`.
static void transpose(const float *from, int64_t from_step, int64_t rows, int64_t columns, float *to, int64_t to_step,
                      int64_t filled) {
    for (int64_t j = 0; j < filled; j += 16)
        for (int64_t i = 0; i < columns; i++)
            for (int64_t b = j; b < j + 16 && b < filled; b++)
                to[i * to_step + b] = b < rows ? from[b * from_step + i] : 0.0f;
}

// Copies between samples side by side (one row a sample) and a tile; samples past the end of the batch are zero.
template <int T>
static void into_tile(const float *samples, int64_t first, int64_t batch, int64_t n, float *tile) {
    transpose(samples + first * n, n, std::min<int64_t>(T, batch - first), n, tile, T, T);
}
template <int T>
static void out_of_tile(const float *tile, int64_t first, int64_t batch, int64_t n, float *samples) {
    const int64_t count = std::min<int64_t>(T, batch - first);
    transpose(tile, T, n, count, samples + first * n, n, n);
}

// The gradients of the stored values of one output, `columns` at a time.
template <typename vec, int V, int columns>
INLINE void output_gradients(int32_t count, const int32_t *index, int64_t tile_count, int64_t rows, const vec *x,
                             const vec *g, float *grad_values) {
    for (int32_t k = 0; k < count; k += columns) {
        vec dot[columns]{};
        const vec *column[columns];
        for (int j = 0; j < columns; j++) column[j] = x + (int64_t)index[k + j < count ? k + j : k] * V;
        for (int64_t t = 0; t < tile_count; t++)
            for (int v = 0; v < V; v++)
                for (int j = 0; j < columns; j++) dot[j] += g[t * rows * V + v] * column[j][t * rows * V + v];
        for (int j = 0; j < columns && k + j < count; j++) grad_values[k + j] = total(dot[j]);
    }
}

// The gradients of the values between `outputs` outputs and up to T inputs of a dense layer: the sum over all samples of an
// output's gradient g, a scalar, times that sample's inputs, side by side in x.
template <typename vec, int V, int outputs>
INLINE void block_gradients(int64_t n_in, int64_t count, int64_t tile_count, int64_t rows, const vec *x, const vec *g,
                            float *grad_values) {
    constexpr int T = V * sizeof(vec) / sizeof(float);
    vec sum[outputs][V]{};
    for (int64_t t = 0; t < tile_count; t++)
        dense_product<vec, V, outputs>(T, (const float *)(g + t * rows * V), T, 1, x + t * T * V, sum);
    for (int r = 0; r < outputs; r++)
        __builtin_memcpy(grad_values + r * n_in, sum[r], (count < T ? count : T) * sizeof(float));
}

template <typename vec, int V>
static void forward(const Layer *layers, int count, const float *params, int64_t batch, const float *x, float *y,
                    float *workspace, bool keep, int threads) {
    constexpr int T = V * sizeof(vec) / sizeof(float);
    const Layer &last = layers[count - 1];
    const int64_t tiles = (batch + T - 1) / T, tile_size = (last.output + last.n_out) * T;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tiles; t++) {
        float *tile = workspace + (keep ? t : omp_get_thread_num()) * tile_size;
        into_tile<T>(x, t * T, batch, layers[0].n_in, tile);
        for (int l = 0; l < count; l++) {
            const Layer &layer = layers[l];
            const float *values = params + layer.values, *bias = params + layer.bias;
            const vec *in = (const vec *)(tile + layer.input * T);
            vec *out = (vec *)(tile + layer.output * T);
            auto activate = [&](int64_t o, const vec *sum) {
                for (int v = 0; v < V; v++)  // ReLU that lets NaN pass
                    out[o * V + v] = &layer == &last ? sum[v] : sum[v] < 0 ? vec{} : sum[v];
            };
            if (layer.dense)
                dense_products<vec, V>(layer.n_out, layer.n_in, values, layer.n_in, 1, bias, in, activate);
            else
                sparse_products<vec, V>(layer.n_out, layer.row_start, layer.column, values, bias, in, activate);
        }
        out_of_tile<T>(tile + last.output * T, t * T, batch, last.n_out, y);
    }
}

// `tiles` is what forward kept; each layer's gradient of its input takes the place of the input. Writes the parameters'
// gradients to `grad_params` and the input's to `grad_x`, if they are given. `scratch` has room for the values of a sparse
// layer or, in turn, the transposed inputs of a dense one, ceil(batch / T) * ceil(n_in / T) squares of T * T.
template <typename vec, int V>
static void backward(const Layer *layers, int count, const float *params, int64_t batch, const float *grad_y,
                     float *grad_x, float *grad_params, float *tiles, float *scratch, int threads) {
    constexpr int T = V * sizeof(vec) / sizeof(float);
    const Layer &last = layers[count - 1];
    const int64_t tile_count = (batch + T - 1) / T, rows = last.output + last.n_out;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tile_count; t++)
            into_tile<T>(grad_y, t * T, batch, last.n_out, tiles + (t * rows + last.output) * T);
        for (int l = count - 1; l >= 0; l--) {
            const Layer &layer = layers[l];
            const float *values = params + layer.values;
            const vec *x = (const vec *)tiles + layer.input * V, *g = (const vec *)tiles + layer.output * V;
            if (grad_params) {
                float *grad_values = grad_params + layer.values;
                // a narrow layer is not worth the copy
                const bool by_block = layer.dense && layer.n_in >= T / 2 && layer.n_out >= T / 4;
#pragma omp for schedule(static)
                for (int64_t o = 0; o < layer.n_out; o++) {
                    vec sum{};
                    for (int64_t t = 0; t < tile_count; t++)
                        for (int v = 0; v < V; v++) sum += g[(t * rows + o) * V + v];
                    grad_params[layer.bias + o] = total(sum);
                    if (by_block) continue;
                    const int32_t start = layer.row_start[o], stop = layer.row_start[o + 1];
                    output_gradients<vec, V, 8>(stop - start, layer.column + start, tile_count, rows, x, g + o * V,
                                                grad_values + start);
                }
                if (by_block) {
                    const int64_t n = layer.n_in, blocks = (n + T - 1) / T;
#pragma omp for schedule(static) collapse(2)
                    for (int64_t b = 0; b < blocks; b++)
                        for (int64_t t = 0; t < tile_count; t++)
                            transpose((const float *)(x + (t * rows + b * T) * V), T, std::min<int64_t>(T, n - b * T), T,
                                      scratch + (b * tile_count + t) * T * T, T, T);
#pragma omp for schedule(static) collapse(2)
                    for (int64_t b = 0; b < blocks; b++)
                        for (int64_t o = 0; o < layer.n_out; o += R) {
                            const vec *copy = (const vec *)scratch + b * tile_count * T * V;
                            float *grad = grad_values + o * n + b * T;
                            if (o + R <= layer.n_out)
                                block_gradients<vec, V, R>(n, n - b * T, tile_count, rows, copy, g + o * V, grad);
                            else
                                for (int64_t r = 0; o + r < layer.n_out; r++)
                                    block_gradients<vec, V, 1>(n, n - b * T, tile_count, rows, copy, g + (o + r) * V,
                                                               grad + r * n);
                        }
                }
            }
            if (l == 0 && !grad_x) continue;
            if (!layer.dense) {
#pragma omp for schedule(static)
                for (int64_t k = 0; k < layer.row_start[layer.n_out]; k++) scratch[k] = values[layer.position[k]];
            }
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tile_count; t++) {
                const vec *g_out = (const vec *)tiles + (t * rows + layer.output) * V;
                vec *in = (vec *)tiles + (t * rows + layer.input) * V;
                auto overwrite = [&](int64_t i, const vec *sum) {
                    for (int v = 0; v < V; v++)  // through the ReLU that made the input
                        in[i * V + v] = l > 0 && in[i * V + v] <= 0 ? vec{} : sum[v];
                };
                if (layer.dense)
                    dense_products<vec, V>(layer.n_in, layer.n_out, values, 1, layer.n_in, nullptr, g_out, overwrite);
                else
                    sparse_products<vec, V>(layer.n_in, layer.column_start, layer.row, scratch, nullptr, g_out,
                                            overwrite);
                if (l == 0) out_of_tile<T>((const float *)in, t * T, batch, layer.n_in, grad_x);
            }
        }
    }
}

extern "C" {
int tile_width(int64_t batch) { return batch < W ? 1 : V * W; }

void mlp_forward(const Layer *layers, int count, const float *params, int64_t batch, const float *x, float *y,
                 float *workspace, int keep, int threads) {
    auto run = batch < W ? forward<float, 1> : forward<vector, V>;
    run(layers, count, params, batch, x, y, workspace, keep, threads);
}

void mlp_backward(const Layer *layers, int count, const float *params, int64_t batch, const float *grad_y, float *grad_x,
                  float *grad_params, float *tiles, float *scratch, int threads) {
    auto run = batch < W ? backward<float, 1> : backward<vector, V>;
    run(layers, count, params, batch, grad_y, grad_x, grad_params, tiles, scratch, threads);
}
}
