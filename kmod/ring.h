/* SPDX-License-Identifier: GPL-2.0 */
#ifndef KERF_RING_H
#define KERF_RING_H

#include "layout.h"

/* Full and corrupt are different: a full ring is waited for, a corrupt one ends the link. */
enum kerf_result {
	KERF_OK = 0,
	KERF_EMPTY = 1,
	KERF_FULL = 2,
	KERF_CORRUPT = 3,
	KERF_TOO_LONG = 4,
};

/* What may take the reserved slots. */
enum kerf_class {
	KERF_DATA = 0,
	KERF_CONTROL = 1,
};

/* The measures of a region: read once when it is opened, never again. */
struct kerf_region {
	void *mem;
	u32 peers;
	u32 slots;
	u32 bytes;
};

/* Where a packet lies: the second part is used where it wraps around the end of the byte ring. */
struct kerf_span {
	u8 *at[2];
	u32 len[2];
};

/* The sending end of one directed ring. Its fields are private to this end: the peer cannot write them. */
struct kerf_producer {
	struct kerf_ring_mem *ring;
	u32 slots;
	u32 bytes;
	u32 head;	/* slots published, counted on and on */
	u32 tail;	/* last tail that was believed */
	u32 filled;	/* bytes taken in the byte ring, counted on and on */
	u32 freed;	/* last freed that was believed */
	u32 want;	/* ticket of the last wait for room */
	u32 rung;	/* last wake ticket that was answered with a doorbell */
};

/* The receiving end; likewise. */
struct kerf_consumer {
	struct kerf_ring_mem *ring;
	u32 slots;
	u32 bytes;
	u32 tail;
	u32 head;	/* last head that was believed */
	u32 freed;
	u32 wake;
	u32 rung;
};

struct kerf_packet {
	struct kerf_span span;
	u32 len;
	u32 bulk;	/* bytes that it takes in the byte ring */
};

u64 kerf_region_size(u32 peers, u32 slots, u32 bytes);
int kerf_region_format(struct kerf_region *region, void *mem, u64 size, u32 peers, u32 slots, u32 bytes);
int kerf_region_open(struct kerf_region *region, void *mem, u64 size);
struct kerf_peer_entry *kerf_peer_entry(const struct kerf_region *region, u32 peer);
struct kerf_ring_mem *kerf_ring_of(const struct kerf_region *region, u32 from, u32 to);

void kerf_producer_init(struct kerf_producer *p, const struct kerf_region *region, struct kerf_ring_mem *ring);
enum kerf_result kerf_producer_reserve(struct kerf_producer *p, u32 len, enum kerf_class class,
				       struct kerf_span *span);
void kerf_producer_publish(struct kerf_producer *p, u32 len);
bool kerf_producer_must_ring(struct kerf_producer *p);
void kerf_producer_want_room(struct kerf_producer *p);
void kerf_producer_has_room(struct kerf_producer *p);

void kerf_consumer_init(struct kerf_consumer *c, const struct kerf_region *region, struct kerf_ring_mem *ring);
enum kerf_result kerf_consumer_peek(struct kerf_consumer *c, struct kerf_packet *packet);
void kerf_consumer_pass(struct kerf_consumer *c, const struct kerf_packet *packet);
void kerf_consumer_release(struct kerf_consumer *c, const struct kerf_packet *packet);
bool kerf_consumer_must_ring(struct kerf_consumer *c);
void kerf_consumer_sleep(struct kerf_consumer *c);
void kerf_consumer_awake(struct kerf_consumer *c);

void kerf_span_write(const struct kerf_span *span, u32 at, const void *from, u32 len);
void kerf_span_read(const struct kerf_span *span, u32 at, void *to, u32 len);

#endif /* KERF_RING_H */
