/* What is kept between steps, moved towards a batch, as core/estimators.py does it. */

#ifndef KERAS_BN_MOVING_H
#define KERAS_BN_MOVING_H

#include <math.h>
#include <stdint.h>

/* Say whether moments may be kept: deviations from a mean that is not finite are not, either. */
static int is_known(float m2) { return m2 < INFINITY; }

/* How much of what is kept stays, and what comes. */
typedef struct {
    float old, fresh;
} Shares;

static float moved(float old, float fresh, Shares shares) {
    return shares.old == 0 ? fresh : old * shares.old + fresh * shares.fresh;
}

/* Return a variance whose root moves. */
static float moved_by_root(float old, float fresh, float epsilon, Shares shares) {
    float root = moved(sqrtf(old + epsilon), sqrtf(fresh + epsilon), shares);
    float variance = root * root - epsilon;
    return variance < 0 ? 0 : variance; /* a NaN stays one */
}

#endif
