// SPDX-License-Identifier: GPL-2.0
/*
 * The link between two peers: when the rings between them may be used.
 *
 * A peer that begins takes a new generation, makes its own words zero and says READY. Each end of a link has a
 * name: its peer's generation and a round, which counts the links of this pair that the end has lost. An end that
 * sees a name it has not accepted resets its own words of the two rings, and then acknowledges that name. The link
 * is up when each end has acknowledged the other's present name: then both have reset. An end that loses a link
 * takes a new name, so no name is used for two links: neither end has used the rings before, and a peer that
 * vanishes in the middle of a packet and comes back finds clean rings.
 *
 * A lost link stays down for a while, longer each time, so a peer that keeps breaking the rules, and a third peer
 * that keeps spoiling the rings, cost little. A new generation of the peer ends the wait.
 */
#include "link.h"

/* Of the names of a generation. */
#define FIRST_ROUND	1

static u64 word_of(u32 low, u32 generation)
{
	return (u64)generation << 32 | low;
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
	/*
	 * A peer that sees one of the zeros below and then reads the word sees the new incarnation: pairs with the
	 * acquires of ring.c, after which kerf_link_corrupt() reads the word.
	 */
	smp_mb();
	WRITE_ONCE(entry->vectors, cpu_to_le32(vectors));
	WRITE_ONCE(entry->reason_len, cpu_to_le32(0));
	for (peer = 0; peer < region->peers; peer++) {
		struct kerf_ring_mem *to = kerf_ring_of(region, me, peer);
		struct kerf_ring_mem *from = kerf_ring_of(region, peer, me);

		WRITE_ONCE(to->ack, cpu_to_le64(0));
		WRITE_ONCE(to->begun, cpu_to_le64(word_of(FIRST_ROUND, generation)));
		WRITE_ONCE(to->head, cpu_to_le32(0));
		WRITE_ONCE(to->want, cpu_to_le32(0));
		WRITE_ONCE(from->tail, cpu_to_le32(0));
		WRITE_ONCE(from->freed, cpu_to_le32(0));
		WRITE_ONCE(from->wake, cpu_to_le32(0));
	}
	/* Pairs with the acquire in kerf_peer_word(): a peer that sees it sees the zeros and the vectors. */
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
	/* Pairs with the acquire in kerf_peer_word(): a peer that sees it sees the reason. */
	smp_store_release(&entry->word, cpu_to_le64(word_of(state, generation)));
}

/* States again that we are there, where another peer has written over it. Not after kerf_detach(). */
void kerf_restate(const struct kerf_region *region, u32 me, u32 generation, u32 vectors)
{
	struct kerf_peer_entry *entry = kerf_peer_entry(region, me);
	u64 word = word_of(KERF_PEER_READY, generation);

	if (le32_to_cpu(READ_ONCE(entry->vectors)) != vectors)
		WRITE_ONCE(entry->vectors, cpu_to_le32(vectors));
	if (le64_to_cpu(READ_ONCE(entry->word)) == word)
		return;
	/* Pairs with the acquire in kerf_peer_word(), as in kerf_attach(). */
	smp_store_release(&entry->word, cpu_to_le64(word));
}

void kerf_link_init(struct kerf_link *link, const struct kerf_region *region, u32 me, u32 peer,
		    u32 generation)
{
	*link = (struct kerf_link){
		.region = region, .me = me, .peer = peer, .generation = generation, .round = FIRST_ROUND,
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

static u64 own_name(const struct kerf_link *link)
{
	return word_of(link->round, link->generation);
}

/* What the peer is called now; 0: it is not there. */
static u64 peer_name(const struct kerf_link *link)
{
	u64 word = kerf_peer_word(link->region, link->peer);
	u32 generation = kerf_word_generation(word);
	u64 name;

	if (kerf_word_state(word) != KERF_PEER_READY || !generation)
		return 0;
	/* Pairs with the release in state_name(): what the peer has acknowledged under an older name is gone. */
	name = le64_to_cpu(smp_load_acquire(&from_peer(link)->begun));
	return kerf_word_generation(name) == generation ? name : 0;
}

/* Takes back what we have acknowledged: the peer sees that nothing is taken or sent any more. */
void kerf_link_down(struct kerf_link *link)
{
	/* Pairs with the acquire in kerf_link_poll(): nothing that we did with the rings comes after it. */
	smp_store_release(&to_peer(link)->ack, cpu_to_le64(0));
	link->accepted = 0;
	link->up = false;
	link->tell = true;
}

static void state_name(struct kerf_link *link)
{
	/* Pairs with the acquire in peer_name(): a peer that sees the name sees that our older ack is gone. */
	smp_store_release(&to_peer(link)->begun, cpu_to_le64(own_name(link)));
}

/* Takes a new name: the old one has been used for a link. */
static void begin_anew(struct kerf_link *link)
{
	if (!++link->round)
		link->round = 1;
	state_name(link);
	/*
	 * A peer that sees one of the zeros of reset_words() and then reads the name sees a new name: pairs
	 * with the acquires of ring.c, after which kerf_link_corrupt() reads the name.
	 */
	smp_mb();
}

/* The link has ended, or never came up. Returns whether it was up; then it stays down for a while. */
static bool give_up(struct kerf_link *link, u64 now_ms)
{
	u32 generation = kerf_word_generation(link->accepted);
	bool was_up = link->up;

	kerf_link_down(link);
	if (!was_up)
		return false;
	/* A link that was up for as long as the longest wait starts with the shortest wait again. */
	if (!link->retry_ms || now_ms - link->up_since >= KERF_RETRY_MAX_MS)
		link->retry_ms = KERF_RETRY_MIN_MS;
	else
		link->retry_ms = min_t(u32, 2 * link->retry_ms, KERF_RETRY_MAX_MS);
	link->retry_at = now_ms + link->retry_ms;
	link->lost_with = generation;
	begin_anew(link);
	return true;
}

/* Makes our words of both rings what they are until the link is up, and acknowledges the peer's name. */
static void reset_words(struct kerf_link *link)
{
	kerf_producer_init(&link->tx, link->region, to_peer(link));
	kerf_consumer_init(&link->rx, link->region, from_peer(link));
	/* Pairs with the acquire in kerf_link_poll(): the peer that sees it sees our zeros. */
	smp_store_release(&to_peer(link)->ack, cpu_to_le64(link->accepted));
}

/*
 * States again what this end has stated, where a third peer has written over it: an end that is up does not write
 * these words, and the other end may just wait for them.
 */
static void restate(struct kerf_link *link)
{
	struct kerf_ring_mem *to = to_peer(link);

	if (le64_to_cpu(READ_ONCE(to->begun)) != own_name(link))
		state_name(link);
	if (link->up && le64_to_cpu(READ_ONCE(to->ack)) != link->accepted) {
		/* As in reset_words(). */
		smp_store_release(&to->ack, cpu_to_le64(link->accepted));
	}
}

/*
 * Looks at the peer and does what the handshake asks for. Call it on every doorbell, now and then
 * without one, and before the rings are used. While link->up the rings are @link's tx and rx.
 * @now_ms: of any clock that goes on.
 */
enum kerf_link_event kerf_link_poll(struct kerf_link *link, u64 now_ms)
{
	u64 name, ack;

	restate(link);
	name = peer_name(link);
	if (link->accepted && name != link->accepted && give_up(link, now_ms))
		return KERF_LINK_LOST;
	link->waiting = name && kerf_word_generation(name) == link->lost_with && now_ms < link->retry_at;
	if (!name || link->waiting)
		return KERF_LINK_DOWN;
	if (!link->accepted) {
		link->accepted = name;
		link->lost_with = 0;
		link->tell = true;
	}
	/* At each look until then: a third peer may have written over our words. */
	if (!link->up)
		reset_words(link);
	/* Pairs with the release in reset_words(): the peer's words are zero, or what it made of them since. */
	ack = le64_to_cpu(smp_load_acquire(&from_peer(link)->ack));
	if (ack == own_name(link)) {
		if (link->up)
			return KERF_LINK_UP;
		link->up = true;
		link->up_since = now_ms;
		return KERF_LINK_CAME_UP;
	}
	if (!link->up)
		return KERF_LINK_DOWN;
	/* It has taken back what it acknowledged: it will not use these rings again. */
	give_up(link, now_ms);
	return KERF_LINK_LOST;
}

/*
 * To be called when a ring was found corrupt. The link is down from now on. Returns true when the peer is to
 * blame, or a third one, and false when it has only begun anew.
 */
bool kerf_link_corrupt(struct kerf_link *link, u64 now_ms)
{
	bool blamed = link->accepted && peer_name(link) == link->accepted;

	give_up(link, now_ms);
	return blamed;
}
