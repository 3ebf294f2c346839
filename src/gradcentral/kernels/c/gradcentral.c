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

/* Some of a group's rows: `rows` of them from `row` on, counted over all groups, each of `width` columns. */
typedef struct {
    int64_t group, row, rows, width;
} Block;

INLINE Block block_of(const Item *item, int64_t index) {
    const int64_t group = index / item->blocks, block = index % item->blocks;
    const int64_t first = item->a * block / item->blocks, last = item->a * (block + 1) / item->blocks;
    Block at = {group, group * item->a + first, last - first, item->unit * item->b};
    return at;
}

/* Count a piece's blocks as summed; true for the one call that finds none missing any more. */
static int all_summed(Item *item, const Piece *piece) {
    int64_t missing;
#if defined(_OPENMP)
#pragma omp atomic capture seq_cst
#endif
    missing = item->missing -= piece->end - piece->begin;
    return missing == 0;
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

typedef void (*StepPiece)(Item *, const Piece *, const Rule *);
typedef void (*CenterPiece)(Item *, const Piece *, int, double *);

static const StepPiece STEPS[3][4] = {
    {step_piece_sgd_f32, step_piece_momentum_f32, step_piece_adam_f32, step_piece_amsgrad_f32},
    {step_piece_sgd_f64, step_piece_momentum_f64, step_piece_adam_f64, step_piece_amsgrad_f64},
    {step_piece_sgd_bf16, step_piece_momentum_bf16, step_piece_adam_bf16, step_piece_amsgrad_bf16},
};
static const CenterPiece CENTERS[3] = {center_piece_f32, center_piece_f64, center_piece_bf16};

static const int64_t REAL_SIZES[3] = {4, 8, 4};

/*
 * How the work is shared out, whatever the number of threads, so that results never depend on it. A batch is what a
 * thread takes at a time; a piece larger than PIECE is cut. A group of columns larger than that is summed in up to
 * BLOCKS blocks, and stepped when all are: in a later wave, but soon enough to find its gradient in the cache.
 */
enum { PIECE = 1 << 18, BATCH = 1 << 16, BLOCKS = 4, WAVE = 1 << 21 };

/* A work list under construction; pieces and batches are NULL while they are only counted. */
typedef struct {
    Piece *pieces;
    int64_t *batches, *waves;
    int64_t n_pieces, n_batches, n_waves, in_batch;
} Work;

static void add_piece(Work *work, Piece piece, int64_t elements) {
    if (work->in_batch >= BATCH) {
        if (work->batches) work->batches[work->n_batches] = work->n_pieces;
        work->n_batches++;
        work->in_batch = 0;
    }
    if (work->pieces) work->pieces[work->n_pieces] = piece;
    work->n_pieces++;
    work->in_batch += elements;
}

/* Units of `each` elements, in pieces of at most about PIECE elements. */
static void add_pieces(Work *work, int64_t item, int64_t kind, int64_t units, int64_t each) {
    const int64_t step = each < PIECE ? PIECE / each : 1;
    for (int64_t begin = 0; begin < units; begin += step) {
        const int64_t end = units - begin < step ? units : begin + step;
        add_piece(work, (Piece){item, begin, end, kind}, (end - begin) * each);
    }
}

static void end_wave(Work *work) {
    if (work->waves) work->waves[work->n_waves] = work->n_batches;
    work->n_waves++;
    work->in_batch = BATCH;   /* no batch reaches over two waves */
}

INLINE int is_columns(const Item *item) { return item->placement != PLAIN && item->unit * item->b > 1; }

/* How far a set of columns reaches, from the item `from` on: until a wave's worth of elements is together. */
static int64_t end_of_set(const Item *items, int64_t from, int64_t n_items) {
    int64_t elements = 0;
    for (; from < n_items && elements < WAVE; from++)
        if (is_columns(&items[from])) elements += items[from].group * items[from].a * items[from].unit * items[from].b;
    return from;
}

/* A set's first wave: what fits one thread is summed and stepped at once, the rest is summed. */
static void add_sums(Work *work, Item *items, int64_t from, int64_t to, int32_t dtype, int64_t begin, int64_t *end) {
    *end = begin;
    for (int64_t i = from; i < to; i++) {
        Item *item = &items[i];
        const int64_t width = item->unit * item->b, in_group = item->a * width;
        if (!is_columns(item) || item->group * in_group == 0) continue;
        int64_t blocks = (in_group + PIECE - 1) / PIECE;
        blocks = blocks < BLOCKS ? blocks : BLOCKS;
        item->blocks = (int32_t)(blocks < item->a ? blocks : item->a);
        item->scratch = *end;
        *end += item->group * width * (item->blocks * (int64_t)sizeof(double) + REAL_SIZES[dtype]);
        *end = (*end + 63) / 64 * 64;
        if (item->blocks == 1)
            add_pieces(work, i, GROUPS, item->group, in_group);
        else
            add_pieces(work, i, SUM_BLOCKS, item->group * item->blocks, in_group / item->blocks);
    }
}

/* Its second wave: the rest is stepped, by rows. */
static void add_steps(Work *work, const Item *items, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++)
        if (is_columns(&items[i]) && items[i].blocks > 1)
            add_pieces(work, i, STEP_ROWS, items[i].group * items[i].a, items[i].unit * items[i].b);
}

/*
 * Lay out the work: fills in the items' blocks and scratch, the pieces, the first piece of each batch and the first
 * batch of each wave (and behind the last, their numbers). Waves run one after another. counts: pieces, batches,
 * waves, bytes of scratch. Without pieces only counts.
 */
EXPORT void gradcentral_plan(Item *items, int64_t n_items, int32_t dtype, Piece *pieces, int64_t *batches,
                             int64_t *waves, int64_t *counts) {
    Work work = {pieces, batches, waves, 0, 0, 1, BATCH};
    if (waves) waves[0] = 0;
    for (int64_t i = 0; i < n_items; i++) {
        Item *item = &items[i];
        const int64_t elements = item->group * item->a * item->unit * item->b;
        item->blocks = 1;
        if (elements == 0 || is_columns(item)) continue;
        if (item->placement == PLAIN)
            add_pieces(&work, i, ELEMENTS, elements, 1);
        else
            add_pieces(&work, i, ROWS, item->group, item->a);
    }
    /*
     * One set of columns is stepped while the next is summed: sums | steps + sums | … | steps. Two sets are under way
     * at a time and take turns with two halves of the scratch, of which the first must hold the largest of its sets.
     */
    int64_t half = 0, scratch = 0, end, set = 0;
    for (int64_t from = 0, to; from < n_items; from = to, set++) {
        to = end_of_set(items, from, n_items);
        add_sums(&(Work){NULL, NULL, NULL, 0, 0, 0, 0}, items, from, to, dtype, 0, &end);
        if (set % 2 == 0 && end > half) half = end;
    }
    set = 0;
    for (int64_t from = 0, before = 0; before < n_items; set++) {
        const int64_t to = end_of_set(items, from, n_items);
        if (set > 0) add_steps(&work, items, before, from);
        add_sums(&work, items, from, to, dtype, set % 2 ? half : 0, &end);
        if (end > scratch) scratch = end;
        end_wave(&work);
        if (set > 0) before = from;
        from = to;
    }
    if (batches) batches[work.n_batches] = work.n_pieces;
    counts[0] = work.n_pieces, counts[1] = work.n_batches, counts[2] = work.n_waves - 1, counts[3] = scratch;
}

static void set_scratch(Item *items, int64_t n_items, char *scratch) {
    for (int64_t i = 0; i < n_items; i++) {
        Item *item = &items[i];
        const int64_t width = item->unit * item->b;
        if (!is_columns(item)) continue;
        item->sums = (double *)(scratch + item->scratch);
        item->means = item->sums + item->group * item->blocks * width;
        item->missing = item->group * item->blocks;
    }
}

#if defined(_OPENMP)
#define PARALLEL _Pragma("omp parallel num_threads(threads) if (threads > 1 && list->n_batches > 1)")
#define EACH _Pragma("omp for schedule(dynamic, 1)")
#else
#define PARALLEL
#define EACH
#endif

/* A work list as gradcentral_plan made it. */
typedef struct {
    const Piece *pieces;
    const int64_t *batches, *waves;
    int64_t n_batches, n_waves;
    char *scratch;
} List;

static void set_pointers(Item *items, int64_t n_items, void *const *pointers) {
    for (int64_t i = 0; i < n_items; i++) {
        items[i].w = pointers[i];
        items[i].g = pointers[i + n_items];
        items[i].m = pointers[i + n_items * 2];
        items[i].v = pointers[i + n_items * 3];
        items[i].x = pointers[i + n_items * 4];
    }
}

/* Count Adam's step and correct the bias of its averages, for each item by its own counter. */
static void count_steps(Item *items, int64_t n_items, void *const *pointers, const Rule *rule) {
    double seen = -1, step_size = 0, root_correction = 0;
    for (int64_t i = 0; i < n_items; i++) {
        void *step = pointers[i + n_items * 5];
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
EXPORT void gradcentral_step(Item *items, int64_t n_items, void *const *pointers, const List *list, int32_t dtype,
                             int32_t kind, const Rule *rule, int32_t threads) {
    const StepPiece step_piece = STEPS[dtype][kind];
    set_pointers(items, n_items, pointers);
    set_scratch(items, n_items, list->scratch);
    if (kind == ADAM || kind == AMSGRAD) count_steps(items, n_items, pointers, rule);
    (void)threads;
    PARALLEL
    for (int64_t wave = 0; wave < list->n_waves; wave++) {
        EACH
        for (int64_t k = list->waves[wave]; k < list->waves[wave + 1]; k++)
            for (int64_t p = list->batches[k]; p < list->batches[k + 1]; p++)
                step_piece(&items[list->pieces[p].item], &list->pieces[p], rule);
    }
}

/*
 * Each item's w: center it, write the mean of each weight vector to means, or give each back the mean that stands
 * there. means holds the items' numbers one after another, item i's from first_mean[i]; CENTER takes NULL for both.
 */
EXPORT void gradcentral_center(Item *items, int64_t n_items, void *const *pointers, const List *list, int32_t dtype,
                               int32_t what, double *means, const int64_t *first_mean, int32_t threads) {
    const CenterPiece center_piece = CENTERS[dtype];
    set_pointers(items, n_items, pointers);
    set_scratch(items, n_items, list->scratch);
    (void)threads;
    PARALLEL
    for (int64_t wave = 0; wave < list->n_waves; wave++) {
        EACH
        for (int64_t k = list->waves[wave]; k < list->waves[wave + 1]; k++)
            for (int64_t p = list->batches[k]; p < list->batches[k + 1]; p++) {
                const int64_t item = list->pieces[p].item;
                center_piece(&items[item], &list->pieces[p], what, what == CENTER ? NULL : means + first_mean[item]);
            }
    }
}

/* So that the caller can check that it agrees on the layout of the structures. */
EXPORT int64_t gradcentral_sizes(int32_t which) {
    static const int64_t sizes[] = {sizeof(Item), sizeof(Piece), sizeof(Rule), sizeof(List)};
    return sizes[which];
}

EXPORT int32_t gradcentral_has_openmp(void) {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

/*
 * Reads and writes what a step does and computes nothing: the bound that memory sets, for measuring. Leaves every
 * value as it is, for zero is 0; the compiler must not know.
 */
EXPORT void gradcentral_stream(void *const *pointers, const int64_t *bytes, int64_t n_items, int32_t states,
                               uint64_t zero, int32_t threads) {
    enum { CHUNK = 1 << 20 };
    (void)threads;
    for (int64_t i = 0; i < n_items; i++) {
        const uint64_t *g = (const uint64_t *)pointers[i + n_items];
        const int64_t words = bytes[i] / 8, n_batches = (words + CHUNK / 8 - 1) / (CHUNK / 8);
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (n_batches > 1)
#endif
        for (int64_t k = 0; k < n_batches; k++) {
            const int64_t begin = k * (CHUNK / 8), end = begin + CHUNK / 8 < words ? begin + CHUNK / 8 : words;
            uint64_t *w = (uint64_t *)pointers[i], *m = (uint64_t *)pointers[i + 2 * n_items],
                     *v = (uint64_t *)pointers[i + 3 * n_items];
            if (states == 2)
#pragma omp simd
                for (int64_t j = begin; j < end; j++) w[j] |= g[j] & zero, m[j] |= g[j] & zero, v[j] |= g[j] & zero;
            else if (states == 1)
#pragma omp simd
                for (int64_t j = begin; j < end; j++) w[j] |= g[j] & zero, m[j] |= g[j] & zero;
            else
#pragma omp simd
                for (int64_t j = begin; j < end; j++) w[j] |= zero;
        }
    }
}
