// SPDX-License-Identifier: GPL-2.0
/*
 * The link between two peers: when the rings between them may be used.
 *
 * A peer that begins takes a new generation, makes its own words zero and says READY. Each end that
 * sees a generation it has not accepted resets its own words of the two rings between them, and then
 * acknowledges that generation. The link is up when each end has acknowledged the other's present
 * generation: then both have reset, and neither has used the rings before. So a peer that vanishes in the
 * middle of a packet and comes back finds clean rings.
 *
 * A peer that writes what it must not is refused until it comes back with another generation.
 */
#include "link.h"

static u64 word_of(u32 state, u32 generation)
{
	return (u64)generation << 32 | state;
}

/*
 * Begins a new incarnation of the peer @me, whose entry and rings are ours to write. Returns its
 * generation. @vectors: interrupts that the others can ring it with.
 */
u32 kerf_attach(const struct kerf_region *region, u32 me, u32 vectors)
{
	struct kerf_peer_entry *entry = kerf_peer_entry(region, me);
	u32 generation = kerf_word_generation(le64_to_cpu(READ_ONCE(entry->word))) + 1;
	u32 peer;

	if (!generation)
		generation = 1;
	WRITE_ONCE(entry->word, cpu_to_le64(word_of(KERF_PEER_STARTING, generation)));
	/* Who sees one of the zeros below and then looks at the word sees that we have begun anew. */
	smp_mb();
	WRITE_ONCE(entry->vectors, cpu_to_le32(vectors));
	WRITE_ONCE(entry->reason_len, cpu_to_le32(0));
	for (peer = 0; peer < region->peers; peer++) {
		struct kerf_ring_mem *to = kerf_ring_of(region, me, peer);
		struct kerf_ring_mem *from = kerf_ring_of(region, peer, me);

		WRITE_ONCE(to->ack, cpu_to_le32(0));
		WRITE_ONCE(to->head, cpu_to_le32(0));
		WRITE_ONCE(to->want, cpu_to_le32(0));
		WRITE_ONCE(from->tail, cpu_to_le32(0));
		WRITE_ONCE(from->freed, cpu_to_le32(0));
		WRITE_ONCE(from->wake, cpu_to_le32(0));
	}
	/* Pairs with the acquire in kerf_peer_word(): who sees it sees the zeros and the vectors. */
	smp_store_release(&entry->word, cpu_to_le64(word_of(KERF_PEER_READY, generation)));
	return generation;
}

/*
 * Ends the incarnation @generation, our own copy: KERF_PEER_LEFT, or KERF_PEER_PANICKED with a reason. May run in any
 * context.
 */
void kerf_detach(const struct kerf_region *region, u32 me, u32 generation, u32 state, const char *reason,
		 u32 reason_len)
{
	struct kerf_peer_entry *entry = kerf_peer_entry(region, me);

	reason_len = min_t(u32, reason_len, KERF_REASON_MAX);
	if (reason_len)
		memcpy(entry->reason, reason, reason_len);
	WRITE_ONCE(entry->reason_len, cpu_to_le32(reason_len));
	/* Pairs with the acquire in kerf_peer_word(): who sees it sees the reason. */
	smp_store_release(&entry->word, cpu_to_le64(word_of(state, generation)));
}

void kerf_link_init(struct kerf_link *link, const struct kerf_region *region, u32 me, u32 peer,
		    u32 generation)
{
	*link = (struct kerf_link){
		.region = region, .me = me, .peer = peer, .generation = generation,
	};
}

static struct kerf_ring_mem *to_peer(const struct kerf_link *link)
{
	return kerf_ring_of(link->region, link->me, link->peer);
}

static struct kerf_ring_mem *from_peer(const struct kerf_link *link)
{
	return kerf_ring_of(link->region, link->peer, link->me);
}

/* Takes back what we have acknowledged: the peer sees that nothing is taken or sent any more. */
void kerf_link_down(struct kerf_link *link)
{
	/* Pairs with the acquire in kerf_link_poll(): nothing that we did with the rings comes after it. */
	smp_store_release(&to_peer(link)->ack, cpu_to_le32(0));
	link->accepted = 0;
	link->up = false;
	link->tell = true;
}

static void refuse(struct kerf_link *link)
{
	link->refused = link->accepted;
	kerf_link_down(link);
}

static void accept(struct kerf_link *link, u32 generation)
{
	kerf_producer_init(&link->tx, link->region, to_peer(link));
	kerf_consumer_init(&link->rx, link->region, from_peer(link));
	/* Pairs with the acquire in kerf_link_poll(): the peer that sees it sees our zeros. */
	smp_store_release(&to_peer(link)->ack, cpu_to_le32(generation));
	link->accepted = generation;
	link->refused = 0;
	link->tell = true;
}

/*
 * Looks at the peer and does what the handshake asks for. Call it on every doorbell, now and then
 * without one, and before the rings are used. While link->up the rings are @link's tx and rx.
 */
enum kerf_link_event kerf_link_poll(struct kerf_link *link)
{
	u64 word = kerf_peer_word(link->region, link->peer);
	u32 generation = kerf_word_generation(word);
	bool ready = kerf_word_state(word) == KERF_PEER_READY && generation;
	u32 ack;

	if (link->accepted && (!ready || generation != link->accepted)) {
		bool was_up = link->up;

		kerf_link_down(link);
		if (was_up)
			return KERF_LINK_LOST;
	}
	if (!ready || generation == link->refused)
		return KERF_LINK_DOWN;
	if (!link->accepted)
		accept(link, generation);
	/* Pairs with the release in accept(): the peer's words of the rings are zero, or what it made of them since. */
	ack = le32_to_cpu(smp_load_acquire(&from_peer(link)->ack));
	if (ack == link->generation) {
		if (link->up)
			return KERF_LINK_UP;
		link->up = true;
		return KERF_LINK_CAME_UP;
	}
	if (!link->up)
		return KERF_LINK_DOWN;
	/* It has taken back what it acknowledged: it will not use these rings again. */
	refuse(link);
	return KERF_LINK_LOST;
}

/*
 * To be called when a ring was found corrupt. Returns true when the peer is to blame and is refused from
 * now on, false when it has only begun anew. The link is down either way.
 */
bool kerf_link_corrupt(struct kerf_link *link)
{
	u64 word = kerf_peer_word(link->region, link->peer);

	if (kerf_word_state(word) != KERF_PEER_READY || kerf_word_generation(word) != link->accepted) {
		kerf_link_down(link);
		return false;
	}
	refuse(link);
	return true;
}
