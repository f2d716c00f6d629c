// SPDX-License-Identifier: GPL-2.0
/* One end of a link and one heartbeat connection, for src/lib.rs to hold without knowing their layout. */
#include <stdlib.h>

#include "../kmp.h"
#include "../link.h"

struct shim_end {
	struct kerf_region region;
	struct kerf_link link;
};

/* NULL with *error set when the memory is no region. */
struct shim_end *shim_open(void *mem, u64 size, u32 me, u32 peer, int *error)
{
	struct shim_end *end = calloc(1, sizeof(*end));

	*error = kerf_region_open(&end->region, mem, size);
	if (*error) {
		free(end);
		return NULL;
	}
	kerf_link_init(&end->link, &end->region, me, peer, kerf_attach(&end->region, me, 1));
	return end;
}

int shim_format(void *mem, u64 size, u32 peers, u32 slots, u32 bytes)
{
	struct kerf_region region;

	return kerf_region_format(&region, mem, size, peers, slots, bytes);
}

void shim_free(struct shim_end *end)
{
	free(end);
}

void shim_detach(struct shim_end *end, u32 state, const char *reason, u32 len)
{
	kerf_detach(&end->region, end->link.me, end->link.generation, state, reason, len);
}

int shim_poll(struct shim_end *end, u64 now_ms)
{
	return kerf_link_poll(&end->link, now_ms);
}

bool shim_up(const struct shim_end *end)
{
	return end->link.up;
}

bool shim_waiting(const struct shim_end *end)
{
	return end->link.waiting;
}

void shim_restate(struct shim_end *end)
{
	kerf_restate(&end->region, end->link.me, end->link.generation, 1);
}

bool shim_corrupt(struct shim_end *end, u64 now_ms)
{
	return kerf_link_corrupt(&end->link, now_ms);
}

int shim_put(struct shim_end *end, const u8 *data, u32 len, bool control)
{
	struct kerf_span span;
	u32 half = len / 2;
	int result;

	if (!end->link.up)
		return KERF_FULL;
	result = kerf_producer_reserve(&end->link.tx, len, control ? KERF_CONTROL : KERF_DATA, &span);
	if (result != KERF_OK)
		return result;
	kerf_span_write(&span, 0, data, half);
	kerf_span_write(&span, half, data + half, len - half);
	kerf_producer_publish(&end->link.tx, len);
	return KERF_OK;
}

/* @to holds KERF_PACKET_MAX bytes. */
int shim_take(struct shim_end *end, u8 *to, u32 *len)
{
	struct kerf_packet packet;
	u32 third;
	int result;

	if (!end->link.up)
		return KERF_EMPTY;
	result = kerf_consumer_peek(&end->link.rx, &packet);
	if (result != KERF_OK)
		return result;
	*len = packet.len;
	third = packet.len / 3;
	kerf_span_read(&packet.span, 0, to, third);
	kerf_span_read(&packet.span, third, to + third, packet.len - third);
	kerf_consumer_release(&end->link.rx, &packet);
	return KERF_OK;
}

bool shim_sender_must_ring(struct shim_end *end)
{
	return end->link.up && kerf_producer_must_ring(&end->link.tx);
}

bool shim_receiver_must_ring(struct shim_end *end)
{
	return end->link.up && kerf_consumer_must_ring(&end->link.rx);
}

void shim_sleep(struct shim_end *end)
{
	if (end->link.up)
		kerf_consumer_sleep(&end->link.rx);
}

void shim_awake(struct shim_end *end)
{
	if (end->link.up)
		kerf_consumer_awake(&end->link.rx);
}

void shim_want_room(struct shim_end *end)
{
	if (end->link.up)
		kerf_producer_want_room(&end->link.tx);
}

void shim_has_room(struct shim_end *end)
{
	if (end->link.up)
		kerf_producer_has_room(&end->link.tx);
}

struct shim_kmp {
	struct kerf_kmp connection;
	struct kerf_kmp_identity identity;
};

struct shim_kmp *shim_kmp_new(const char *instance, u64 generation)
{
	struct shim_kmp *kmp = calloc(1, sizeof(*kmp));

	strncpy(kmp->identity.instance, instance, KMP_INSTANCE_MAX);
	strncpy(kmp->identity.release, "6.12.0-test", KMP_RELEASE_MAX);
	memset(kmp->identity.boot_id, 7, sizeof(kmp->identity.boot_id));
	kmp->identity.generation = generation;
	return kmp;
}

void shim_kmp_free(struct shim_kmp *kmp)
{
	free(kmp);
}

/* @reply holds KMP_REPLY_MAX bytes. */
int shim_kmp_feed(struct shim_kmp *kmp, const u8 **data, u32 *len, u8 *reply, u32 *reply_len)
{
	const struct kerf_kmp_figures figures = {
		.cpus = 2, .memory_total_kib = 1000, .memory_available_kib = 600, .boottime_ns = 12345,
	};
	int result = kerf_kmp_feed(&kmp->connection, &kmp->identity, &figures, data, len);

	memcpy(reply, kmp->connection.reply, kmp->connection.reply_len);
	*reply_len = kmp->connection.reply_len;
	return result;
}
