/* Threads for the parts of a job: those of an OpenMP runtime, or helpers of our own.

   A helper waits for work from one call to the next: a thread that is made anew starts on the core
   of the one that made it, and half a millisecond can pass until another core takes it. */

#ifndef KERAS_BN_TEAM_H
#define KERAS_BN_TEAM_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#ifdef __SSE2__
#include <emmintrin.h>
#define REST() _mm_pause()
#else
#define REST() ((void)0)
#endif

/* What is to be done for each part, by whoever comes. */
typedef struct {
    void (*body)(void *job, int part);
    void *job;
    int parts, threads;
    atomic_int next, helping;
} Team;

static void (*start)(void (*)(void *), void *, unsigned, unsigned);

/* Take the threads of an OpenMP runtime, by its GOMP_parallel. */
void keras_bn_threads(void *parallel) {
    start = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
}

static void take_parts(void *given) {
    Team *team = given;
    for (int part; (part = atomic_fetch_add(&team->next, 1)) < team->parts;)
        team->body(team->job, part);
}

/* ---- Helpers: each is free, or has been given a team, of which it may not know yet. */

typedef struct {
    atomic_int is_taken, is_asleep;
    _Atomic(Team *) team;
    pthread_mutex_t lock;
    pthread_cond_t wake;
} Helper;

enum { MOST = 63, AWAKE = 50000 }; /* how many; how long to stay awake without work [ns] */
static Helper helpers[MOST];
static atomic_int number_of_helpers;
static pthread_mutex_t recruiting = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t finishing = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t finished = PTHREAD_COND_INITIALIZER;

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Stay awake for a while; others may need the core then. */
#define WHILE_AWAKE(done)                                                                 \
    for (int64_t last = nanoseconds() + AWAKE; nanoseconds() < last;)                     \
        for (int i = 0; i < 32; i++, REST())                                              \
            if (done) return

static void wait_for_team(Helper *own) {
    WHILE_AWAKE(atomic_load(&own->team));
    pthread_mutex_lock(&own->lock);
    atomic_store(&own->is_asleep, 1);
    while (!atomic_load(&own->team)) pthread_cond_wait(&own->wake, &own->lock);
    atomic_store(&own->is_asleep, 0);
    pthread_mutex_unlock(&own->lock);
}

static void *help(void *given) {
    Helper *own = given;
    for (;;) {
        wait_for_team(own);
        Team *team = atomic_exchange(&own->team, NULL);
        if (!team) continue; /* it went on without us */
        take_parts(team);
        atomic_store(&own->is_taken, 0);
        pthread_mutex_lock(&finishing);
        atomic_fetch_sub(&team->helping, 1);
        pthread_cond_broadcast(&finished);
        pthread_mutex_unlock(&finishing);
    }
    return NULL;
}

/* A child of this process has none of its threads. */
static void forget_helpers(void) {
    atomic_store(&number_of_helpers, 0);
    pthread_mutex_init(&recruiting, NULL);
    pthread_mutex_init(&finishing, NULL);
    pthread_cond_init(&finished, NULL);
}

/* See to it that there are so many helpers; signals are for others. */
static void recruit(int wanted) {
    static int is_prepared;
    sigset_t all, before;
    sigfillset(&all);
    pthread_mutex_lock(&recruiting);
    if (!is_prepared) is_prepared = !pthread_atfork(NULL, NULL, forget_helpers);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = atomic_load(&number_of_helpers); is_prepared && i < wanted && i < MOST; i++) {
        pthread_t thread;
        helpers[i] = (Helper){.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};
        if (pthread_create(&thread, NULL, help, &helpers[i])) break;
        pthread_detach(thread);
        atomic_store(&number_of_helpers, i + 1);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_mutex_unlock(&recruiting);
}

static void ask(Helper *helper, Team *team) {
    atomic_fetch_add(&team->helping, 1);
    atomic_store(&helper->team, team);
    if (!atomic_load(&helper->is_asleep)) return;
    pthread_mutex_lock(&helper->lock);
    pthread_cond_signal(&helper->wake);
    pthread_mutex_unlock(&helper->lock);
}

/* Let helpers who have not begun be free again, and wait for the others. */
static void dismiss(Helper **asked, int number, Team *team) {
    for (int i = 0; i < number; i++) {
        Team *given = team;
        if (!atomic_compare_exchange_strong(&asked[i]->team, &given, NULL)) continue;
        atomic_store(&asked[i]->is_taken, 0);
        atomic_fetch_sub(&team->helping, 1);
    }
    WHILE_AWAKE(!atomic_load(&team->helping));
    pthread_mutex_lock(&finishing);
    while (atomic_load(&team->helping)) pthread_cond_wait(&finished, &finishing);
    pthread_mutex_unlock(&finishing);
}

static void with_helpers(Team *team) {
    Helper *asked[MOST];
    int number = 0;
    if (atomic_load(&number_of_helpers) < team->threads - 1) recruit(team->threads - 1);
    for (int i = 0; i < atomic_load(&number_of_helpers) && number < team->threads - 1; i++) {
        int is_taken = 0;
        if (!atomic_compare_exchange_strong(&helpers[i].is_taken, &is_taken, 1)) continue;
        asked[number++] = &helpers[i];
        ask(&helpers[i], team);
    }
    take_parts(team);
    dismiss(asked, number, team);
}

/* Do all parts, in so many threads at most. */
static void in_parts(void (*body)(void *, int), void *job, int parts, int threads) {
    Team team = {body, job, parts, threads < parts ? threads : parts, 0, 0};
    if (team.threads == 1) take_parts(&team);
    else if (start) start(take_parts, &team, (unsigned)team.threads, 0);
    else with_helpers(&team);
}

#endif
