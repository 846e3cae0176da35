/* The mathematics of a cell, for one and for as many at once as a register holds in double
   precision. */

#ifndef KERAS_BN_CELL_H
#define KERAS_BN_CELL_H

#include "vectors.h"

#define NAMED(name) name
#define Number float
#define Wide double
#define Answer int
#define NARROWED(wide) ((float)(wide))
#define WIDENED(number) ((double)(number))
#define ROOT(wide) sqrt(wide)
#define CHOSEN(is_chosen, one, other) ((is_chosen) ? (one) : (other))
#include "cell_template.h"

#define NAMED(name) name##_several
#define Number Half
#define Wide Doubles
#define Answer Choice
#define NARROWED(wide) narrowed(wide)
#define WIDENED(number) doubles_of(number)
#define ROOT(wide) root_of(wide)
#define CHOSEN(is_chosen, one, other) chosen(is_chosen, one, other)
#include "cell_template.h"

#endif
