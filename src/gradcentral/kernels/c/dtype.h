/* Everything for one dtype: centering, and the step of every rule. RULE is a number for the preprocessor to compare. */
#include "types.h"
#include "center.h"

#define RULE 0
#define RULE_NAME sgd
#include "step.h"
#undef RULE
#undef RULE_NAME

#define RULE 1
#define RULE_NAME momentum
#include "step.h"
#undef RULE
#undef RULE_NAME

#define RULE 2
#define RULE_NAME adam
#include "step.h"
#undef RULE
#undef RULE_NAME

#define RULE 3
#define RULE_NAME amsgrad
#include "step.h"
#undef RULE
#undef RULE_NAME

#undef STORED
#undef REAL
#undef SUFFIX
#undef LOAD
#undef STORE
#undef ROOT
#undef PARTIAL
#undef STRETCH
#undef SLOT
