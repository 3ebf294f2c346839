/*
 * The division of the work into pieces, batches and waves. It is the same for any number of
 * threads, so that results do not depend on that number.
 *
 *     wave 0   elements, rows   set 0: small groups, sums of large groups
 *     wave 1                    set 1: small groups, sums of large groups   set 0: steps
 *     wave 2                    set 2: small groups, sums of large groups   set 1: steps
 *
 *     A large group of columns:
 *              ◂── width ──▸
 *     block 0  ░░░░░░░░░░░░░  ▸ sums ┐               ┌▸ some rows  ░░░░░░░░░░░░░
 *     block 1  ░░░░░░░░░░░░░  ▸ sums ┼▸ means, next  ┼▸ some rows  ░░░░░░░░░░░░░
 *     block 2  ░░░░░░░░░░░░░  ▸ sums ┘  wave         └▸ some rows  ░░░░░░░░░░░░░
 *
 * A row is summed and updated while it is in the cache of one core. Columns have to be read
 * completely before the first element can be updated. One thread processes a group of columns that
 * fits one piece; a larger group is summed in up to BLOCKS blocks of rows, by several threads, and
 * updated in the next wave. Such groups form sets of about WAVE elements: large enough to keep all
 * threads busy, small enough that the gradients summed in one wave are still in the shared cache in
 * the next.
 */
#ifndef GRADCENTRAL_WORK_LIST_H
#define GRADCENTRAL_WORK_LIST_H
#include "kernels.h"

/* PIECE: elements of the largest piece. BATCH: least number of elements that a thread takes at a
 * time. BLOCKS: most blocks of a group. WAVE: elements of a set of columns. */
enum { PIECE = 1 << 18, BATCH = 1 << 16, BLOCKS = 4, WAVE = 1 << 21 };

static const int64_t REAL_SIZES[3] = {4, 8, 4};

/* A block of a group: `rows` rows of `width` columns, beginning at `row`, counted over all groups.
 */
typedef struct {
    int64_t row, rows, width;
} Block;

INLINE Block block_of(const Parameter *p, int64_t index) {
    const int64_t group = index / p->blocks, block = index % p->blocks;
    const int64_t first = p->outer * block / p->blocks, last = p->outer * (block + 1) / p->blocks;
    return (Block){group * p->outer + first, last - first, width_of(p)};
}

/* Count a piece's blocks as summed; return true only to the caller that completes the parameter. */
static int all_summed(Parameter *p, const WorkPiece *piece) {
    int64_t missing;
#if defined(_OPENMP)
#pragma omp atomic capture seq_cst
#endif
    missing = p->missing -= piece->end - piece->begin;
    return missing == 0;
}

/* A work list under construction; arrays are NULL while their lengths are only counted. */
typedef struct {
    WorkPiece *pieces;
    int64_t *batches, *waves;
    int64_t n_pieces, n_batches, n_waves, in_batch;
} WorkListBuilder;

static void add_piece(WorkListBuilder *work, WorkPiece piece, int64_t elements) {
    if (work->in_batch >= BATCH) {
        if (work->batches) work->batches[work->n_batches] = work->n_pieces;
        work->n_batches++;
        work->in_batch = 0;
    }
    if (work->pieces) work->pieces[work->n_pieces] = piece;
    work->n_pieces++;
    work->in_batch += elements;
}

/* Add `count` rows, blocks or groups of `each` elements, in pieces of at most about PIECE elements.
 */
static void add_pieces(WorkListBuilder *work, int64_t parameter, int64_t kind, int64_t count,
                       int64_t each) {
    const int64_t step = each < PIECE ? PIECE / each : 1;
    for (int64_t begin = 0; begin < count; begin += step) {
        const int64_t end = count - begin < step ? count : begin + step;
        add_piece(work, (WorkPiece){parameter, begin, end, kind}, (end - begin) * each);
    }
}

static void end_wave(WorkListBuilder *work) {
    if (work->waves) work->waves[work->n_waves] = work->n_batches;
    work->n_waves++;
    work->in_batch = BATCH; /* no batch extends over two waves */
}

/* Return the end of the set of columns that begins at parameter `from` and has WAVE elements. */
static int64_t end_of_set(const Parameter *parameters, int64_t from, int64_t n_parameters) {
    int64_t elements = 0;
    for (; from < n_parameters && elements < WAVE; from++)
        if (is_columns(&parameters[from])) elements += size_of(&parameters[from]);
    return from;
}

/* Add the first wave of a set: small groups completely, and the sums of large ones. Return the end
 * of its scratch memory. */
static int64_t add_sums(WorkListBuilder *work, Parameter *parameters, int64_t from, int64_t to,
                        int32_t dtype, int64_t scratch) {
    for (int64_t i = from; i < to; i++) {
        Parameter *p = &parameters[i];
        const int64_t width = width_of(p), in_group = p->outer * width;
        if (!is_columns(p) || size_of(p) == 0) continue;
        int64_t blocks = (in_group + PIECE - 1) / PIECE;
        blocks = blocks < BLOCKS ? blocks : BLOCKS;
        p->blocks = (int32_t)(blocks < p->outer ? blocks : p->outer);
        p->scratch = scratch;
        scratch += p->groups * width * (p->blocks * (int64_t)sizeof(double) + REAL_SIZES[dtype]);
        scratch = (scratch + 63) / 64 * 64;
        if (p->blocks == 1)
            add_pieces(work, i, GROUPS, p->groups, in_group);
        else
            add_pieces(work, i, SUM_BLOCKS, p->groups * p->blocks, in_group / p->blocks);
    }
    return scratch;
}

/* Add the second wave of a set: the rows of its large groups. */
static void add_steps(WorkListBuilder *work, const Parameter *parameters, int64_t from,
                      int64_t to) {
    for (int64_t i = from; i < to; i++) {
        const Parameter *p = &parameters[i];
        if (is_columns(p) && p->blocks > 1)
            add_pieces(work, i, STEP_ROWS, p->groups * p->outer, width_of(p));
    }
}

/* Divide the work: fill in `blocks` and `scratch` of the parameters, the pieces, the first piece of
 * each batch, the first batch of each wave (followed by the total), and `counts`: the numbers of
 * pieces, batches, waves and bytes of scratch. If the three arrays are NULL, only count. */
EXPORT void gradcentral_plan(Parameter *parameters, int64_t n_parameters, int32_t dtype,
                             WorkPiece *pieces, int64_t *batches, int64_t *waves, int64_t *counts) {
    WorkListBuilder work = {pieces, batches, waves, 0, 0, 1, BATCH};
    if (waves) waves[0] = 0;
    for (int64_t i = 0; i < n_parameters; i++) {
        Parameter *p = &parameters[i];
        p->blocks = 1;
        if (size_of(p) == 0 || is_columns(p)) continue;
        if (p->placement == PLAIN)
            add_pieces(&work, i, ELEMENTS, size_of(p), 1);
        else
            add_pieces(&work, i, ROWS, p->groups, p->outer);
    }
    /* Two sets are in progress at a time. They alternate between two halves of the scratch memory,
     * the first of which is as large as the largest even-numbered set, which this first pass over
     * the sets determines. */
    int64_t half = 0, scratch = 0, set = 0;
    for (int64_t from = 0, to; from < n_parameters; from = to, set++) {
        to = end_of_set(parameters, from, n_parameters);
        const int64_t end = add_sums(&(WorkListBuilder){0}, parameters, from, to, dtype, 0);
        if (set % 2 == 0 && end > half) half = end;
    }
    set = 0;
    for (int64_t from = 0, before = 0; before < n_parameters; set++) {
        const int64_t to = end_of_set(parameters, from, n_parameters);
        if (set > 0) add_steps(&work, parameters, before, from);
        const int64_t end = add_sums(&work, parameters, from, to, dtype, set % 2 ? half : 0);
        if (end > scratch) scratch = end;
        end_wave(&work);
        if (set > 0) before = from;
        from = to;
    }
    if (batches) batches[work.n_batches] = work.n_pieces;
    counts[0] = work.n_pieces, counts[1] = work.n_batches, counts[2] = work.n_waves - 1,
    counts[3] = scratch;
}
#endif
