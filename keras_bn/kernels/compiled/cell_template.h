/* What becomes of the sums of a cell, or of those of several at once: it is included for either.

   `Number` is a number in float32, or a vector of them, `Wide` the same in double precision, and
   `Answer` what a comparison of these gives; NARROWED, WIDENED, ROOT and CHOSEN are what is not
   written alike for both, and NAMED gives names. */

/* Moments; whether the pivot of the sums was so far off that digits are lost. */
typedef struct {
    Number center, offset, m2;
    Answer is_far;
} NAMED(Found);

/* Return moments from sums about a pivot. */
INLINED NAMED(Found) NAMED(found_of)(Wide first, Wide second, double share, Number pivot,
                                     double most, int is_centered) {
    Wide distance = is_centered ? first * share : (Wide){0}, lost = first * distance;
    Wide rest = second - lost, mean = WIDENED(pivot) + distance;
    Number center = NARROWED(mean), m2 = NARROWED(rest);
    m2 = CHOSEN(m2 < 0, (Number){0}, m2); /* a NaN stays one; narrowed before, it is no branch */
    return (NAMED(Found)){center, NARROWED(mean - WIDENED(center)), m2, lost > most * rest};
}

/* Return the distance of a mean from a pivot. */
INLINED Wide NAMED(deviation_of)(Number center, Number offset, Number pivot) {
    return WIDENED(center) - WIDENED(pivot) + WIDENED(offset);
}

/* The maps to z, and to gamma·(r·z + d) + beta, of which some may be missing. */
typedef struct {
    Number scale, shift, slope, level;
} NAMED(Map);

INLINED NAMED(Map) NAMED(map_of)(Number m2, Number offset, double share, double epsilon,
                                 const Number *r, const Number *d, const Number *gamma,
                                 const Number *beta) {
    Number a = NARROWED(1 / ROOT(WIDENED(m2) * share + epsilon)), b = -offset * a;
    NAMED(Map) map = {.scale = a, .shift = b};
    if (r) a *= *r, b = b * *r + *d;
    if (gamma) a *= *gamma, b = b * *gamma + *beta;
    map.slope = a, map.level = b;
    return map;
}

/* Over a set of n, dx = scale·(g·dy - Σ g·dy / n - z·Σ g·dy·z / n), where g is gamma·r: with
   z = (x - center)·scale + shift that is factor·dy + (x - center)·slope + level. */
typedef struct {
    Number factor, slope, level;
} NAMED(Combination);

/* Return Σ dy·z from Σ dy and Σ dy·(x - center); or, from Σ dy and that, Σ dy·(r·z + d). */
INLINED Wide NAMED(mapped)(Wide first, Wide second, Number scale, Number shift) {
    return second * WIDENED(scale) + first * WIDENED(shift);
}

/* Return slope and level from the sums of a set, Σ g·dy and Σ g·dy·z; `centered` is 1/n, or 0. */
INLINED NAMED(Combination) NAMED(combination_of)(Number factor, Wide first, Wide second,
                                                 Number scale, Number shift, double share,
                                                 double centered) {
    Wide by_slope = -second * share * WIDENED(scale);
    Wide level = by_slope * WIDENED(shift) - first * centered * WIDENED(scale);
    return (NAMED(Combination)){factor, NARROWED(by_slope * WIDENED(scale)), NARROWED(level)};
}

#undef NAMED
#undef Number
#undef Wide
#undef Answer
#undef NARROWED
#undef WIDENED
#undef ROOT
#undef CHOSEN
