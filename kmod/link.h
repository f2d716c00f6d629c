/* SPDX-License-Identifier: GPL-2.0 */
#ifndef KERF_LINK_H
#define KERF_LINK_H

#include "ring.h"

/* What a look at the peer shows. */
enum kerf_link_event {
	KERF_LINK_DOWN = 0,	/* no link, as before */
	KERF_LINK_UP = 1,	/* a link, as before */
	KERF_LINK_CAME_UP = 2,
	KERF_LINK_LOST = 3,	/* connections over it have ended */
};

/* This end of the link with one peer: both rings between the two. */
struct kerf_link {
	const struct kerf_region *region;
	u32 me;
	u32 peer;
	u32 generation;		/* ours, and with the round our name */
	u32 round;
	u64 accepted;		/* the peer's name, for which our end was reset; 0: none */
	bool up;
	u64 up_since;		/* ms */
	/* A link that was lost is not begun anew with this generation of the peer before retry_at. */
	u32 lost_with;
	u32 retry_ms;		/* how long that was last; 0: never */
	u64 retry_at;		/* ms */
	bool waiting;		/* the last look had to wait for that */
	bool tell;		/* our word for the peer has changed: ring it, then clear this */
	struct kerf_producer tx;
	struct kerf_consumer rx;
};

u32 kerf_attach(const struct kerf_region *region, u32 me, u32 vectors);
void kerf_detach(const struct kerf_region *region, u32 me, u32 generation, u32 state, const char *reason,
		 u32 reason_len);
void kerf_restate(const struct kerf_region *region, u32 me, u32 generation, u32 vectors);
void kerf_link_init(struct kerf_link *link, const struct kerf_region *region, u32 me, u32 peer,
		    u32 generation);
enum kerf_link_event kerf_link_poll(struct kerf_link *link, u64 now_ms);
bool kerf_link_corrupt(struct kerf_link *link, u64 now_ms);
void kerf_link_down(struct kerf_link *link);

static inline u32 kerf_word_state(u64 word)
{
	return (u32)word;
}

static inline u32 kerf_word_generation(u64 word)
{
	return word >> 32;
}

static inline u64 kerf_peer_word(const struct kerf_region *region, u32 peer)
{
	/* Pairs with the releases in kerf_attach(), kerf_detach() and kerf_restate(). */
	return le64_to_cpu(smp_load_acquire(&kerf_peer_entry(region, peer)->word));
}

#endif /* KERF_LINK_H */
