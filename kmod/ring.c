// SPDX-License-Identifier: GPL-2.0
/*
 * The rings: one directed ring from a sending to a receiving peer.
 *
 *   sender                                      receiver
 *   ------                                      --------
 *   reads tail, freed (acquire)                 reads head (acquire)
 *   checks them against what it has sent        checks it against what it has taken
 *   writes the packet and its descriptor        reads the descriptor once, checks it
 *   writes head (release)                       copies the packet once
 *   full barrier, reads wake: doorbell?         writes freed, tail (release)
 *                                               full barrier, reads want: doorbell?
 *
 * Each end keeps its own position to itself and compares: whatever the peer writes into the shared
 * words, an address is only ever made of this end's own numbers. Compiled for the kernel and, for tests,
 * for user space.
 */
#include "ring.h"

/* Both languages' numbers are those of the golden file. */
#define KERF_GOLDEN(name, value) static_assert((u64)(KERF_GOLDEN_##name) == (value), #name);
#define KERF_GOLDEN_MAGIC		KERF_MAGIC
#define KERF_GOLDEN_VERSION		KERF_VERSION
#define KERF_GOLDEN_PEERS_MAX		KERF_PEERS_MAX
#define KERF_GOLDEN_SLOTS_MIN		KERF_SLOTS_MIN
#define KERF_GOLDEN_SLOTS_MAX		KERF_SLOTS_MAX
#define KERF_GOLDEN_SLOTS_RESERVED	KERF_SLOTS_RESERVED
#define KERF_GOLDEN_BYTES_MIN		KERF_BYTES_MIN
#define KERF_GOLDEN_BYTES_MAX		KERF_BYTES_MAX
#define KERF_GOLDEN_BYTES_ALIGN		KERF_BYTES_ALIGN
#define KERF_GOLDEN_INLINE_MAX		KERF_INLINE_MAX
#define KERF_GOLDEN_PACKET_MAX		KERF_PACKET_MAX
#define KERF_GOLDEN_SLOT_SIZE		KERF_SLOT_SIZE
#define KERF_GOLDEN_HEADER_MAGIC	offsetof(struct kerf_header, magic)
#define KERF_GOLDEN_HEADER_VERSION	offsetof(struct kerf_header, version)
#define KERF_GOLDEN_HEADER_PEERS	offsetof(struct kerf_header, peers)
#define KERF_GOLDEN_HEADER_SLOTS	offsetof(struct kerf_header, slots)
#define KERF_GOLDEN_HEADER_BYTES	offsetof(struct kerf_header, bytes)
#define KERF_GOLDEN_HEADER_SIZE		offsetof(struct kerf_header, size)
#define KERF_GOLDEN_PEERS_OFFSET	KERF_PEERS_OFFSET
#define KERF_GOLDEN_PEER_STRIDE		sizeof(struct kerf_peer_entry)
#define KERF_GOLDEN_PEER_WORD		offsetof(struct kerf_peer_entry, word)
#define KERF_GOLDEN_PEER_VECTORS	offsetof(struct kerf_peer_entry, vectors)
#define KERF_GOLDEN_PEER_REASON_LEN	offsetof(struct kerf_peer_entry, reason_len)
#define KERF_GOLDEN_PEER_REASON		offsetof(struct kerf_peer_entry, reason)
#define KERF_GOLDEN_REASON_MAX		KERF_REASON_MAX
#define KERF_GOLDEN_RING_HEAD		offsetof(struct kerf_ring_mem, head)
#define KERF_GOLDEN_RING_WANT		offsetof(struct kerf_ring_mem, want)
#define KERF_GOLDEN_RING_ACK		offsetof(struct kerf_ring_mem, ack)
#define KERF_GOLDEN_RING_BEGUN		offsetof(struct kerf_ring_mem, begun)
#define KERF_GOLDEN_RING_TAIL		offsetof(struct kerf_ring_mem, tail)
#define KERF_GOLDEN_RING_FREED		offsetof(struct kerf_ring_mem, freed)
#define KERF_GOLDEN_RING_WAKE		offsetof(struct kerf_ring_mem, wake)
#define KERF_GOLDEN_RING_DESCRIPTORS	offsetof(struct kerf_ring_mem, descriptors)
#define KERF_GOLDEN_KIND_INLINE		KERF_KIND_INLINE
#define KERF_GOLDEN_KIND_BULK		KERF_KIND_BULK
#define KERF_GOLDEN_RETRY_MIN_MS	KERF_RETRY_MIN_MS
#define KERF_GOLDEN_RETRY_MAX_MS	KERF_RETRY_MAX_MS
#define KERF_GOLDEN_STATE_ABSENT	KERF_PEER_ABSENT
#define KERF_GOLDEN_STATE_STARTING	KERF_PEER_STARTING
#define KERF_GOLDEN_STATE_READY		KERF_PEER_READY
#define KERF_GOLDEN_STATE_LEFT		KERF_PEER_LEFT
#define KERF_GOLDEN_STATE_PANICKED	KERF_PEER_PANICKED
#include "../kerf-ring/golden/layout.def"

static u64 page_up(u64 n)
{
	return (n + KERF_PAGE - 1) & ~(u64)(KERF_PAGE - 1);
}

static u32 bulk_size(u32 len)
{
	return (len + KERF_BYTES_ALIGN - 1) & ~(u32)(KERF_BYTES_ALIGN - 1);
}

static u64 rings_offset(u32 peers)
{
	return page_up(KERF_PEERS_OFFSET + (u64)peers * sizeof(struct kerf_peer_entry));
}

static u64 ring_stride(u32 slots, u32 bytes)
{
	return page_up(sizeof(struct kerf_ring_mem) + (u64)slots * (sizeof(__le64) + KERF_SLOT_SIZE) + bytes);
}

static bool power_of_two(u32 n)
{
	return n && !(n & (n - 1));
}

static bool measures_are_valid(u32 peers, u32 slots, u32 bytes)
{
	return peers >= 1 && peers <= KERF_PEERS_MAX &&
	       power_of_two(slots) && slots >= KERF_SLOTS_MIN && slots <= KERF_SLOTS_MAX &&
	       power_of_two(bytes) && bytes >= KERF_BYTES_MIN && bytes <= KERF_BYTES_MAX;
}

/* Bytes that a region of these measures takes; 0 when they are out of range. */
u64 kerf_region_size(u32 peers, u32 slots, u32 bytes)
{
	if (!measures_are_valid(peers, slots, bytes))
		return 0;
	return rings_offset(peers) + (u64)peers * peers * ring_stride(slots, bytes);
}

/* Makes an empty region of zeroed memory. */
int kerf_region_format(struct kerf_region *region, void *mem, u64 size, u32 peers, u32 slots, u32 bytes)
{
	struct kerf_header *header = mem;
	u64 needed = kerf_region_size(peers, slots, bytes);

	if (!needed)
		return -EINVAL;
	if (needed > size)
		return -ENOSPC;
	header->version = cpu_to_le32(KERF_VERSION);
	header->peers = cpu_to_le32(peers);
	header->slots = cpu_to_le32(slots);
	header->bytes = cpu_to_le32(bytes);
	header->size = cpu_to_le64(needed);
	/* Pairs with the acquire in kerf_region_open(), which then sees the other fields. */
	smp_store_release(&header->magic, cpu_to_le64(KERF_MAGIC));
	*region = (struct kerf_region){ .mem = mem, .peers = peers, .slots = slots, .bytes = bytes };
	return 0;
}

/*
 * Takes over the measures of a region that was made elsewhere. -ENOENT: nothing was made there yet;
 * -EPROTO: another version; -EINVAL: measures that are out of range or do not fit into @size.
 */
int kerf_region_open(struct kerf_region *region, void *mem, u64 size)
{
	struct kerf_header *header = mem;
	u32 peers, slots, bytes;
	u64 stated, needed;

	if (size < KERF_PAGE)
		return -EINVAL;
	/* Pairs with the release in kerf_region_format(): the other fields are there when the magic is. */
	if (le64_to_cpu(smp_load_acquire(&header->magic)) != KERF_MAGIC)
		return -ENOENT;
	if (le32_to_cpu(READ_ONCE(header->version)) != KERF_VERSION)
		return -EPROTO;
	peers = le32_to_cpu(READ_ONCE(header->peers));
	slots = le32_to_cpu(READ_ONCE(header->slots));
	bytes = le32_to_cpu(READ_ONCE(header->bytes));
	stated = le64_to_cpu(READ_ONCE(header->size));
	needed = kerf_region_size(peers, slots, bytes);
	if (!needed || stated != needed || needed > size)
		return -EINVAL;
	*region = (struct kerf_region){ .mem = mem, .peers = peers, .slots = slots, .bytes = bytes };
	return 0;
}

/* @peer is below region->peers. */
struct kerf_peer_entry *kerf_peer_entry(const struct kerf_region *region, u32 peer)
{
	return (struct kerf_peer_entry *)((u8 *)region->mem + KERF_PEERS_OFFSET) + peer;
}

/* @from and @to are below region->peers. */
struct kerf_ring_mem *kerf_ring_of(const struct kerf_region *region, u32 from, u32 to)
{
	u64 at = rings_offset(region->peers) +
		 ((u64)from * region->peers + to) * ring_stride(region->slots, region->bytes);

	return (struct kerf_ring_mem *)((u8 *)region->mem + at);
}

/* @index is any number; the slot is the one that it falls on. */
static u8 *slot_of(struct kerf_ring_mem *ring, u32 slots, u32 index)
{
	return (u8 *)&ring->descriptors[slots] + (size_t)(index & (slots - 1)) * KERF_SLOT_SIZE;
}

/* Likewise: @position is any number. @len is at most @bytes. */
static void bulk_span(struct kerf_ring_mem *ring, u32 slots, u32 bytes, u32 position, u32 len,
		      struct kerf_span *span)
{
	u8 *base = slot_of(ring, slots, 0) + (size_t)slots * KERF_SLOT_SIZE;
	u32 at = position & (bytes - 1);
	u32 first = min_t(u32, len, bytes - at);

	span->at[0] = base + at;
	span->len[0] = first;
	span->at[1] = base;
	span->len[1] = len - first;
}

static void inline_span(struct kerf_ring_mem *ring, u32 slots, u32 index, u32 len, struct kerf_span *span)
{
	span->at[0] = slot_of(ring, slots, index);
	span->len[0] = len;
	span->at[1] = span->at[0];
	span->len[1] = 0;
}

/* Makes this end new, and its shared words zero. */
void kerf_producer_init(struct kerf_producer *p, const struct kerf_region *region, struct kerf_ring_mem *ring)
{
	*p = (struct kerf_producer){ .ring = ring, .slots = region->slots, .bytes = region->bytes };
	WRITE_ONCE(ring->head, cpu_to_le32(0));
	WRITE_ONCE(ring->want, cpu_to_le32(0));
}

/*
 * Finds room for a packet of @len bytes and says where it goes. Nothing is sent before
 * kerf_producer_publish(); a reservation that is not published leaves no trace.
 */
enum kerf_result kerf_producer_reserve(struct kerf_producer *p, u32 len, enum kerf_class class,
				       struct kerf_span *span)
{
	u32 keep = class == KERF_CONTROL ? 0 : KERF_SLOTS_RESERVED;
	u32 tail, freed;

	if (!len || len > KERF_PACKET_MAX)
		return KERF_TOO_LONG;
	/* Pairs with the release in kerf_consumer_release(): the slot has been read before we write it again. */
	tail = le32_to_cpu(smp_load_acquire(&p->ring->tail));
	/* It moves on from where it was, never past what was published. */
	if (tail - p->tail > p->head - p->tail)
		return KERF_CORRUPT;
	p->tail = tail;
	if (p->slots - (p->head - tail) <= keep)
		return KERF_FULL;
	if (len <= KERF_INLINE_MAX) {
		inline_span(p->ring, p->slots, p->head, len, span);
		return KERF_OK;
	}
	/* Likewise: the bytes have been read. */
	freed = le32_to_cpu(smp_load_acquire(&p->ring->freed));
	if (freed - p->freed > p->filled - p->freed)
		return KERF_CORRUPT;
	p->freed = freed;
	if (p->bytes - (p->filled - freed) < bulk_size(len))
		return KERF_FULL;
	bulk_span(p->ring, p->slots, p->bytes, p->filled, len, span);
	return KERF_OK;
}

/* Sends what the last reservation was filled with; @len is its length. */
void kerf_producer_publish(struct kerf_producer *p, u32 len)
{
	bool bulk = len > KERF_INLINE_MAX;
	u64 kind = bulk ? KERF_KIND_BULK : KERF_KIND_INLINE;
	u64 position = bulk ? p->filled : p->head;
	u64 descriptor = position << 32 | kind << 16 | len;

	WRITE_ONCE(p->ring->descriptors[p->head & (p->slots - 1)], cpu_to_le64(descriptor));
	if (bulk)
		p->filled += bulk_size(len);
	p->head++;
	/* Pairs with the acquire in kerf_consumer_peek(), which then sees the packet and its descriptor. */
	smp_store_release(&p->ring->head, cpu_to_le32(p->head));
}

/* Whether the receiver sleeps and was not rung since. Once for each batch, after its last publish. */
bool kerf_producer_must_ring(struct kerf_producer *p)
{
	u32 wake;

	/* Pairs with kerf_consumer_sleep(): either we see its ticket, or it sees our head. */
	smp_mb();
	wake = le32_to_cpu(READ_ONCE(p->ring->wake));
	if (!wake || wake == p->rung)
		return false;
	p->rung = wake;
	return true;
}

/* Asks for a doorbell when there is room. The caller tries to reserve once more afterwards. */
void kerf_producer_want_room(struct kerf_producer *p)
{
	if (!++p->want)
		p->want = 1;
	WRITE_ONCE(p->ring->want, cpu_to_le32(p->want));
	/* Pairs with kerf_consumer_must_ring(): either it sees our ticket, or we see its tail and freed. */
	smp_mb();
}

void kerf_producer_has_room(struct kerf_producer *p)
{
	WRITE_ONCE(p->ring->want, cpu_to_le32(0));
}

/* Makes this end new, and its shared words zero: awake. */
void kerf_consumer_init(struct kerf_consumer *c, const struct kerf_region *region, struct kerf_ring_mem *ring)
{
	*c = (struct kerf_consumer){ .ring = ring, .slots = region->slots, .bytes = region->bytes };
	WRITE_ONCE(ring->tail, cpu_to_le32(0));
	WRITE_ONCE(ring->freed, cpu_to_le32(0));
	WRITE_ONCE(ring->wake, cpu_to_le32(0));
}

/* Finds the next packet. Its bytes may change while they are read: copy them once, then look. */
enum kerf_result kerf_consumer_peek(struct kerf_consumer *c, struct kerf_packet *packet)
{
	/* Pairs with the release in kerf_producer_publish(): packet and descriptor are there when the head is. */
	u32 head = le32_to_cpu(smp_load_acquire(&c->ring->head));
	u32 ready = head - c->tail;
	u32 len, kind, position;
	u64 descriptor;

	/* At most the ring is full, and it never moves back. */
	if (ready > c->slots || ready < c->head - c->tail)
		return KERF_CORRUPT;
	c->head = head;
	if (!ready)
		return KERF_EMPTY;
	descriptor = le64_to_cpu(READ_ONCE(c->ring->descriptors[c->tail & (c->slots - 1)]));
	len = descriptor & 0xffff;
	kind = descriptor >> 16 & 0xffff;
	position = descriptor >> 32;
	packet->len = len;
	if (kind == KERF_KIND_INLINE) {
		if (!len || len > KERF_INLINE_MAX || position != c->tail)
			return KERF_CORRUPT;
		packet->bulk = 0;
		inline_span(c->ring, c->slots, c->tail, len, &packet->span);
		return KERF_OK;
	}
	if (kind != KERF_KIND_BULK || len <= KERF_INLINE_MAX || len > KERF_PACKET_MAX ||
	    position != c->freed)
		return KERF_CORRUPT;
	packet->bulk = bulk_size(len);
	bulk_span(c->ring, c->slots, c->bytes, c->freed, len, &packet->span);
	return KERF_OK;
}

/* Moves a copy of the consumer behind the packet that its last peek found, which stays where it is. */
void kerf_consumer_pass(struct kerf_consumer *c, const struct kerf_packet *packet)
{
	c->tail++;
	c->freed += packet->bulk;
}

/* Gives back the packet that the last peek found. */
void kerf_consumer_release(struct kerf_consumer *c, const struct kerf_packet *packet)
{
	kerf_consumer_pass(c, packet);
	if (packet->bulk) {
		/* Pairs with the acquire in kerf_producer_reserve(): the bytes have been read before they are free. */
		smp_store_release(&c->ring->freed, cpu_to_le32(c->freed));
	}
	/* Likewise: the slot has been read. */
	smp_store_release(&c->ring->tail, cpu_to_le32(c->tail));
}

/* Whether the sender waits for room and was not rung since. Once for each batch, after its last release. */
bool kerf_consumer_must_ring(struct kerf_consumer *c)
{
	u32 want;

	/* Pairs with kerf_producer_want_room(): either we see its ticket, or it sees our tail and freed. */
	smp_mb();
	want = le32_to_cpu(READ_ONCE(c->ring->want));
	if (!want || want == c->rung)
		return false;
	c->rung = want;
	return true;
}

/* Asks for a doorbell with the next packet. The caller peeks once more afterwards. */
void kerf_consumer_sleep(struct kerf_consumer *c)
{
	if (!++c->wake)
		c->wake = 1;
	WRITE_ONCE(c->ring->wake, cpu_to_le32(c->wake));
	/* Pairs with kerf_producer_must_ring(): either it sees our ticket, or we see its head. */
	smp_mb();
}

void kerf_consumer_awake(struct kerf_consumer *c)
{
	WRITE_ONCE(c->ring->wake, cpu_to_le32(0));
}

/* Copies @len bytes to the place @at within the span, which holds them. */
void kerf_span_write(const struct kerf_span *span, u32 at, const void *from, u32 len)
{
	u32 first = 0;

	if (at < span->len[0]) {
		first = min_t(u32, len, span->len[0] - at);
		memcpy(span->at[0] + at, from, first);
		at = 0;
	} else {
		at -= span->len[0];
	}
	if (len > first)
		memcpy(span->at[1] + at, (const u8 *)from + first, len - first);
}

/* Copies @len bytes from the place @at within the span, which holds them. */
void kerf_span_read(const struct kerf_span *span, u32 at, void *to, u32 len)
{
	u32 first = 0;

	if (at < span->len[0]) {
		first = min_t(u32, len, span->len[0] - at);
		memcpy(to, span->at[0] + at, first);
		at = 0;
	} else {
		at -= span->len[0];
	}
	if (len > first)
		memcpy((u8 *)to + first, span->at[1] + at, len - first);
}
