/*
 * Gradient Centralization on the CPU: fused optimizer steps, and centering alone, for all parameters in one call.
 *
 * Plain C, called through ctypes: no Python and no torch headers, one library for every version of both.
 * Read step.h for the algorithm; kernels.h for what an Item is; this file for how the work is laid out and shared.
 */
#include "kernels.h"
#include "bf16.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

/* A slice of neighboring columns of one group; or one unit's runs, where those alone are wider than a panel. */
typedef struct {
    int64_t offset, width, stride;   /* elements; a rows of `width` lie `stride` apart */
    int64_t first_unit, units;
} Panel;

INLINE int is_rows(const Item *item) { return item->unit * item->b == 1; }

/* Bytes of one tensor's panel. Both passes over a panel should find it in the cache. */
enum { PANEL_BYTES = 1 << 19 };

static int64_t units_per_panel(const Item *item, int64_t size) {
    int64_t widest = PANEL / item->b, fits = PANEL_BYTES / (size * item->a) / item->b;
    int64_t whole_lines = (64 + item->b - 1) / item->b;   /* never so narrow that cache lines are shared out */
    int64_t units = fits > whole_lines ? fits : whole_lines;
    units = units < widest ? units : widest;
    return units > 1 ? units : 1;
}

static int64_t panels_per_group(const Item *item, int64_t size) {
    int64_t units = units_per_panel(item, size);
    return (item->unit + units - 1) / units;
}

static Panel panel(const Item *item, int64_t index, int64_t size) {
    int64_t count = panels_per_group(item, size), units = units_per_panel(item, size);
    int64_t group = index / count, first = index % count * units;
    Panel p;
    p.units = item->unit - first < units ? item->unit - first : units;
    p.stride = item->unit * item->b;
    p.offset = group * item->a * p.stride + first * item->b;
    p.width = p.units * item->b;
    p.first_unit = group * item->unit + first;
    return p;
}

/* Column sums to the means of their units, given to each column. */
static void unit_means(const Item *item, Panel p, double *sums) {
    const double fan_in = (double)item->a * (double)item->b;
    for (int64_t u = 0; u < p.units; u++) {
        double total = 0;
        for (int64_t k = 0; k < item->b; k++) total += sums[u * item->b + k];
        for (int64_t k = 0; k < item->b; k++) sums[u * item->b + k] = total / fan_in;
    }
}

enum { CENTER = 0, MEANS = 1, RESTORE = 2 };                   /* what to do to the means of one tensor */

#define DTYPE F32
#include "dtype.h"
#undef DTYPE
#define DTYPE F64
#include "dtype.h"
#undef DTYPE
#define DTYPE BF16
#include "dtype.h"
#undef DTYPE

typedef void (*StepPiece)(const Item *, const Piece *, const Rule *);

static const StepPiece STEPS[3][4] = {
    {step_piece_sgd_f32, step_piece_momentum_f32, step_piece_adam_f32, step_piece_amsgrad_f32},
    {step_piece_sgd_f64, step_piece_momentum_f64, step_piece_adam_f64, step_piece_amsgrad_f64},
    {step_piece_sgd_bf16, step_piece_momentum_bf16, step_piece_adam_bf16, step_piece_amsgrad_bf16},
};

static const int64_t SIZES[3] = {4, 8, 2};

/* The share of the work that a thread takes at a time: small enough to balance, large enough to be worth taking. */
enum { PIECE_ELEMENTS = 1 << 18, BATCH_ELEMENTS = 1 << 16 };

/*
 * Lay out the work: pieces of at most about PIECE_ELEMENTS elements, and batches of whole pieces (batches[k] is the
 * first piece of batch k), none of them depending on the number of threads. Returns the number of pieces and sets
 * *n_batches; with pieces = NULL only counts, for which batches may be NULL too.
 */
EXPORT int64_t gradcentral_plan(const Item *items, int64_t n_items, int32_t dtype, Piece *pieces, int64_t *batches,
                                int64_t *n_batches) {
    int64_t n = 0, count = 0, in_batch = BATCH_ELEMENTS;
    for (int64_t i = 0; i < n_items; i++) {
        const Item *item = &items[i];
        int64_t units, elements = item->group * item->a * item->unit * item->b;
        if (elements == 0) continue;
        if (item->placement == PLAIN)
            units = elements;
        else if (is_rows(item))
            units = item->group;
        else
            units = item->group * panels_per_group(item, SIZES[dtype]);
        int64_t each = elements / units > 0 ? elements / units : 1;
        int64_t step = PIECE_ELEMENTS / each > 1 ? PIECE_ELEMENTS / each : 1;
        for (int64_t begin = 0; begin < units; begin += step) {
            int64_t end = units - begin < step ? units : begin + step;
            if (in_batch >= BATCH_ELEMENTS) {
                if (batches) batches[count] = n;
                count++;
                in_batch = 0;
            }
            if (pieces) pieces[n] = (Piece){i, begin, end};
            n++;
            in_batch += (end - begin) * each;
        }
    }
    if (batches) batches[count] = n;
    *n_batches = count;
    return n;
}

#if defined(_OPENMP)
#define EACH_BATCH _Pragma("omp parallel for schedule(dynamic, 1) num_threads(threads) if (n_batches > 1)")
#else
#define EACH_BATCH
#endif

static void set_pointers(Item *items, int64_t n_items, void *const *pointers) {
    for (int64_t i = 0; i < n_items; i++, pointers += POINTERS) {
        items[i].w = pointers[0];
        items[i].g = pointers[1];
        items[i].m = pointers[2];
        items[i].v = pointers[3];
        items[i].x = pointers[4];
    }
}

/* Count Adam's step and correct the bias of its averages, for each item by its own counter. */
static void count_steps(Item *items, int64_t n_items, void *const *pointers, const Rule *rule) {
    double seen = -1, step_size = 0, root_correction = 0;
    for (int64_t i = 0; i < n_items; i++) {
        void *step = pointers[i * POINTERS + POINTERS - 1];
        double t = items[i].step_is_f64 ? ++*(double *)step : ++*(float *)step;
        if (t != seen) {
            seen = t;
            step_size = rule->lr / (1 - pow(rule->beta1, t));
            root_correction = 1 / sqrt(1 - pow(rule->beta2, t));
        }
        items[i].step_size = step_size;
        items[i].root_correction = root_correction;
    }
}

/* One optimizer step of all items, which share their dtype and rule. */
EXPORT void gradcentral_step(Item *items, int64_t n_items, void *const *pointers, const Piece *pieces,
                             const int64_t *batches, int64_t n_batches, int32_t dtype, int32_t kind, const Rule *rule,
                             int32_t threads) {
    set_pointers(items, n_items, pointers);
    if (kind == ADAM || kind == AMSGRAD) count_steps(items, n_items, pointers, rule);
    const StepPiece step_piece = STEPS[dtype][kind];
    (void)threads;
    EACH_BATCH
    for (int64_t k = 0; k < n_batches; k++)
        for (int64_t p = batches[k]; p < batches[k + 1]; p++) step_piece(&items[pieces[p].item], &pieces[p], rule);
}

/*
 * Each item's w: center it, write the mean of each weight vector to means, or give each back the mean that stands
 * there. means holds the items' numbers one after another, item i's from first_mean[i]; CENTER takes NULL for both.
 */
EXPORT void gradcentral_center(Item *items, int64_t n_items, void *const *pointers, const Piece *pieces,
                               const int64_t *batches, int64_t n_batches, int32_t dtype, int32_t what, double *means,
                               const int64_t *first_mean, int32_t threads) {
    set_pointers(items, n_items, pointers);
    (void)threads;
    EACH_BATCH
    for (int64_t k = 0; k < n_batches; k++)
        for (int64_t p = batches[k]; p < batches[k + 1]; p++) {
            const Item *item = &items[pieces[p].item];
            double *own = what == CENTER ? NULL : means + first_mean[pieces[p].item];
            if (dtype == F32)
                center_piece_f32(item, &pieces[p], what, own);
            else if (dtype == F64)
                center_piece_f64(item, &pieces[p], what, own);
            else
                center_piece_bf16(item, &pieces[p], what, own);
        }
}

/* So that the caller can check that it agrees on the layout of the structures. */
EXPORT int64_t gradcentral_sizes(int32_t which) {
    return which == 0 ? (int64_t)sizeof(Item) : which == 1 ? (int64_t)sizeof(Piece) : (int64_t)sizeof(Rule);
}

EXPORT int32_t gradcentral_has_openmp(void) {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}
