/* Runs the kernels with two threads on all kinds of pieces, for ThreadSanitizer. test_races.py
 * builds and runs it. */
#include "gradcentral.c"
#include <stdio.h>
#include <stdlib.h>

enum { TENSORS = 6, PARAMETERS = 2 };

/* The rows of a Linear layer; those of one with few long rows; columns; columns in many small
 * groups, and in large ones; columns whose units have several elements each. Each is larger than
 * one piece. */
static const int64_t SHAPES[][4] = {{12000, 27, 1, 1}, {60, 5001, 1, 1}, {1, 700, 403, 1},
                                    {300, 40, 9, 1},   {3, 500, 200, 1}, {1, 300, 60, 16}};

static void *filled(int64_t bytes) {
    uint16_t *memory = calloc((size_t)bytes / 2 + 64, 2);
    for (int64_t i = 0; i < bytes / 2; i++) memory[i] = (uint16_t)(0x3c00 + i * 37 % 512);
    return memory;
}

static void run(const int64_t *shape, int32_t dtype, int32_t rule, int32_t placement) {
    Parameter parameters[PARAMETERS];
    for (int k = 0; k < PARAMETERS; k++)
        parameters[k] = (Parameter){.groups = shape[0],
                                    .outer = shape[1],
                                    .units = shape[2],
                                    .inner = shape[3],
                                    .phases = 1,
                                    .placement = placement};
    int64_t counts[4];
    gradcentral_plan(parameters, PARAMETERS, dtype, NULL, NULL, NULL, counts);
    WorkPiece *pieces = calloc((size_t)counts[0] + 1, sizeof *pieces);
    int64_t *batches = calloc((size_t)counts[1] + 1, 8), *waves = calloc((size_t)counts[2] + 1, 8);
    gradcentral_plan(parameters, PARAMETERS, dtype, pieces, batches, waves, counts);
    char *scratch = calloc((size_t)counts[3] + 64, 1);
    const WorkList list = {pieces, batches, waves, counts[1], counts[2], scratch};

    const int64_t size = size_of(&parameters[0]), vectors = vectors_of(&parameters[0]);
    void *pointers[TENSORS * PARAMETERS];
    for (int k = 0; k < TENSORS * PARAMETERS; k++)
        pointers[k] = filled(size * (dtype == F64 ? 8 : 4));
    double *means = rule >= MEANS ? calloc((size_t)(PARAMETERS * vectors), 8) : NULL;
    const Coefficients coefficients = {.lr = 0.1,
                                       .momentum = 0.9,
                                       .keep = 1,
                                       .beta1 = 0.9,
                                       .beta2 = 0.999,
                                       .epsilon = 1e-8,
                                       .scale = 1,
                                       .strength = 1};
    gradcentral_run(parameters, PARAMETERS, pointers, &list, dtype, rule, &coefficients, means, 2);

    for (int k = 0; k < TENSORS * PARAMETERS; k++) free(pointers[k]);
    free(pieces), free(batches), free(waves), free(scratch), free(means);
}

int main(void) {
    for (size_t k = 0; k < sizeof SHAPES / sizeof *SHAPES; k++) {
        for (int32_t placement = PLAIN; placement <= REGULARIZED; placement++)
            run(SHAPES[k], F32, ADAM, placement);
        run(SHAPES[k], BF16, MOMENTUM, GRADIENT);
        for (int32_t rule = CENTER; rule <= SHIFT; rule++) run(SHAPES[k], F32, rule, GRADIENT);
    }
    puts("finished");
    return 0;
}
