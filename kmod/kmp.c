// SPDX-License-Identifier: GPL-2.0
/*
 * The kernel's own answer to heartbeats: the instance's side of a KMP heartbeat channel (docs/kmp.md),
 * without user space. It knows HELLO and HEARTBEAT_REQ. Any other request gets ERROR 5, and the
 * connection goes on. Compiled for the kernel and, for tests, for user space.
 */
#include "kmp.h"

#define KMP_MAGIC		0x4b4d5000u
#define KMP_REPLY_BIT		0x8000u
#define KMP_HELLO		0x0001
#define KMP_HEARTBEAT_REQ	0x0101
#define KMP_HEARTBEAT_RSP	0x0102
#define KMP_ERROR		0x0f01
#define KMP_RETRY		0x0f02

#define KMP_E_MALFORMED		1
#define KMP_E_CRC		2
#define KMP_E_VERSION		3
#define KMP_E_TYPE		4
#define KMP_E_UNEXPECTED	5
#define KMP_E_TOO_LARGE		6
#define KMP_E_GENERATION	7
#define KMP_E_WRONG_PEER	16

#define KMP_HELLO_FIXED		56
#define KMP_HEARTBEAT_FIXED	16
#define KMP_ROLE_DAEMON		1
#define KMP_ROLE_INSTANCE	2
#define KMP_CHANNEL_HEARTBEAT	1
#define KMP_CHANNEL_BULK	3
#define KMP_HEALTH_DEGRADED	2
#define KMP_PRESSURE_ABSENT	0xffff

#define KMP_RECORD_INSTANCE	1
#define KMP_RECORD_RELEASE	2
#define KMP_RECORD_AGENT	3
/* A record's flag. */
#define KMP_RECORD_CRITICAL	1

struct kmp_header {
	u16 type;
	u32 sequence;
	u32 payload_len;
	u32 crc;
};

/* Every request and what it may carry; those with a reply have the same limit for it. */
static const struct {
	u16 type;
	bool has_reply;
	u32 limit;
} kmp_types[] = {
	{ 0x0001, true, 1024 },		{ 0x0002, true, 128 },		{ 0x0101, false, 128 },
	{ 0x0102, false, 223 },
	{ 0x0103, false, 1024 },	{ 0x0201, true, 4096 },		{ 0x0202, true, 4096 },
	{ 0x0203, true, 262144 },	{ 0x0211, true, 65536 },	{ 0x0212, false, 1048576 },
	{ 0x0213, true, 1024 },		{ 0x0301, true, 1024 },		{ 0x0302, true, 8192 },
	{ 0x0303, true, 1048576 },	{ 0x0304, true, 65536 },	{ 0x0305, true, 1024 },
	{ 0x0306, true, 1024 },		{ 0x0f01, false, 1024 },	{ 0x0f02, false, 256 },
};

/* Builds a frame around the @payload_len bytes that already stand behind the header in k->reply. */
static void finish(struct kerf_kmp *k, u16 type, u32 sequence, u32 payload_len, u64 now)
{
	u8 *h = k->reply;

	put_unaligned_le32(KMP_MAGIC, h);
	put_unaligned_le16(1, h + 4);
	put_unaligned_le16(type, h + 6);
	put_unaligned_le32(sequence, h + 8);
	put_unaligned_le32(payload_len, h + 12);
	put_unaligned_le64(now, h + 16);
	put_unaligned_le32(0, h + 24);
	put_unaligned_le32(0, h + 28);
	k->reply_len = KMP_HEADER_SIZE + payload_len;
	put_unaligned_le32(kerf_crc32(0, h, k->reply_len), h + 24);
}

/* Sends ERROR. Code 5 ends no connection; every other that is sent here does. */
static enum kerf_kmp_result refuse(struct kerf_kmp *k, u16 code, u16 type, u32 sequence, u64 now)
{
	u8 *p = k->reply + KMP_HEADER_SIZE;

	memset(p, 0, 16);
	put_unaligned_le16(code, p);
	put_unaligned_le16(type, p + 2);
	put_unaligned_le32(sequence, p + 4);
	finish(k, KMP_ERROR, sequence, 16, now);
	return code == KMP_E_UNEXPECTED ? KMP_REPLY : KMP_CLOSE;
}

/*
 * Checks 2 to 6 of a frame's header; returns an error code, or 0. Type and sequence are 0 when the header
 * could not be read.
 */
static u16 check_header(const u8 *h, struct kmp_header *header)
{
	u16 base;
	size_t i;

	memset(header, 0, sizeof(*header));
	if (get_unaligned_le32(h) != KMP_MAGIC)
		return KMP_E_MALFORMED;
	if (get_unaligned_le16(h + 4) != 1)
		return KMP_E_VERSION;
	if (get_unaligned_le32(h + 28) != 0)
		return KMP_E_MALFORMED;
	header->type = get_unaligned_le16(h + 6);
	header->sequence = get_unaligned_le32(h + 8);
	header->payload_len = get_unaligned_le32(h + 12);
	header->crc = get_unaligned_le32(h + 24);
	base = header->type & ~KMP_REPLY_BIT;
	for (i = 0; i < ARRAY_SIZE(kmp_types); i++) {
		if (kmp_types[i].type != base)
			continue;
		if (header->type != base && !kmp_types[i].has_reply)
			return KMP_E_TYPE;
		return header->payload_len > kmp_types[i].limit ? KMP_E_TOO_LARGE : 0;
	}
	return KMP_E_TYPE;
}

/* Nothing answers an answer. */
static bool is_answer(u16 type)
{
	return type & KMP_REPLY_BIT || type == KMP_HEARTBEAT_RSP || type == KMP_ERROR || type == KMP_RETRY;
}

/*
 * Walks the records of a payload. @known: a bit for each kind that its message lists, each at most once.
 * Returns a bit for each that was found, or -1 when the layout is malformed: a record beyond the payload,
 * one twice, padding that is not zero, an unknown one that is critical. Finds INSTANCE_ID on the way.
 */
static int walk_records(const u8 *p, u32 len, u32 known, const u8 **instance, u32 *instance_len)
{
	u32 seen = 0;

	while (len) {
		u32 kind, flags, size, padded, i;

		if (len < 8)
			return -1;
		kind = get_unaligned_le16(p);
		flags = get_unaligned_le16(p + 2);
		size = get_unaligned_le32(p + 4);
		if (size > len - 8)
			return -1;
		padded = (size + 7) & ~7u;
		if (padded > len - 8)
			return -1;
		for (i = size; i < padded; i++)
			if (p[8 + i])
				return -1;
		if (kind < 32 && known & 1u << kind) {
			if (seen & 1u << kind)
				return -1;
			seen |= 1u << kind;
		} else if (flags & KMP_RECORD_CRITICAL) {
			return -1;
		}
		if (kind == KMP_RECORD_INSTANCE && instance) {
			*instance = p + 8;
			*instance_len = size;
		}
		p += 8 + padded;
		len -= 8 + padded;
	}
	return seen;
}

static u32 put_record(u8 *p, u16 kind, u16 flags, const char *text)
{
	u32 len = strlen(text);
	u32 padded = (len + 7) & ~7u;

	put_unaligned_le16(kind, p);
	put_unaligned_le16(flags, p + 2);
	put_unaligned_le32(len, p + 4);
	memset(p + 8, 0, padded);
	memcpy(p + 8, text, len);
	return 8 + padded;
}

static enum kerf_kmp_result hello(struct kerf_kmp *k, const struct kerf_kmp_identity *id,
				  const struct kmp_header *header, u64 now)
{
	const u8 *p = k->frame + KMP_HEADER_SIZE;
	u8 *out = k->reply + KMP_HEADER_SIZE;
	const u32 known = 1u << KMP_RECORD_INSTANCE | 1u << KMP_RECORD_RELEASE | 1u << KMP_RECORD_AGENT;
	const bool bulk = p[5] == KMP_CHANNEL_BULK;
	const u8 *instance = NULL;
	u32 instance_len = 0;
	u16 code = 0;
	int records;
	u32 at;

	if (header->payload_len < KMP_HELLO_FIXED ||
	    !(p[4] == KMP_ROLE_DAEMON || p[4] == KMP_ROLE_INSTANCE) || p[5] < 1 || p[5] > KMP_CHANNEL_BULK ||
	    bulk != !!get_unaligned_le64(p + 40))
		return refuse(k, KMP_E_MALFORMED, header->type, header->sequence, now);
	records = walk_records(p + KMP_HELLO_FIXED, header->payload_len - KMP_HELLO_FIXED, known,
			       &instance, &instance_len);
	if (records < 0 || !(records & 1 << KMP_RECORD_INSTANCE) || instance_len > KMP_INSTANCE_MAX)
		return refuse(k, KMP_E_MALFORMED, header->type, header->sequence, now);
	if (get_unaligned_le16(p) > 1 || get_unaligned_le16(p + 2) < 1)
		code = KMP_E_VERSION;
	else if (p[4] != KMP_ROLE_DAEMON)
		code = KMP_E_WRONG_PEER;
	else if (instance_len != strlen(id->instance) || memcmp(instance, id->instance, instance_len))
		code = KMP_E_WRONG_PEER;
	else if (get_unaligned_le64(p + 8) != id->generation)
		code = KMP_E_GENERATION;
	else if (p[5] != KMP_CHANNEL_HEARTBEAT)
		code = KMP_E_UNEXPECTED;
	if (code)
		return refuse(k, code, header->type, header->sequence, now);
	k->greeted = true;
	memset(out, 0, KMP_HELLO_FIXED);
	put_unaligned_le16(1, out);
	put_unaligned_le16(1, out + 2);
	out[4] = KMP_ROLE_INSTANCE;
	out[5] = KMP_CHANNEL_HEARTBEAT;
	put_unaligned_le64(id->generation, out + 8);
	memcpy(out + 16, id->boot_id, sizeof(id->boot_id));
	at = KMP_HELLO_FIXED;
	at += put_record(out + at, KMP_RECORD_INSTANCE, KMP_RECORD_CRITICAL, id->instance);
	at += put_record(out + at, KMP_RECORD_RELEASE, 0, id->release);
	at += put_record(out + at, KMP_RECORD_AGENT, 0, "kerf-vsock");
	finish(k, KMP_HELLO | KMP_REPLY_BIT, header->sequence, at, now);
	return KMP_REPLY;
}

static enum kerf_kmp_result heartbeat(struct kerf_kmp *k, const struct kerf_kmp_figures *figures,
				      const struct kmp_header *header)
{
	const u8 *p = k->frame + KMP_HEADER_SIZE;
	u8 *out = k->reply + KMP_HEADER_SIZE;

	if (header->payload_len < KMP_HEARTBEAT_FIXED || get_unaligned_le32(p + 12) ||
	    walk_records(p + KMP_HEARTBEAT_FIXED, header->payload_len - KMP_HEARTBEAT_FIXED, 0, NULL, NULL) < 0)
		return refuse(k, KMP_E_MALFORMED, header->type, header->sequence,
			      figures->boottime_ns);
	memset(out, 0, 48);
	put_unaligned_le32(get_unaligned_le32(p), out);
	/* The kernel runs; of the agent and its program it knows nothing. */
	out[4] = KMP_HEALTH_DEGRADED;
	put_unaligned_le16(figures->cpus, out + 6);
	put_unaligned_le16(KMP_PRESSURE_ABSENT, out + 10);
	put_unaligned_le16(KMP_PRESSURE_ABSENT, out + 12);
	put_unaligned_le16(KMP_PRESSURE_ABSENT, out + 14);
	put_unaligned_le64(figures->memory_total_kib, out + 16);
	put_unaligned_le64(figures->memory_available_kib, out + 24);
	finish(k, KMP_HEARTBEAT_RSP, header->sequence, 48, figures->boottime_ns);
	return KMP_REPLY;
}

/* Takes bytes until @want are in the frame; returns whether they are. */
static bool fill(struct kerf_kmp *k, u32 want, const u8 **data, u32 *len)
{
	u32 take = k->have < want ? min_t(u32, want - k->have, *len) : 0;

	if (take)
		memcpy(k->frame + k->have, *data, take);
	k->have += take;
	*data += take;
	*len -= take;
	return k->have >= want;
}

/*
 * Takes bytes of the stream from @data, moving @data and @len on, up to the end of one frame. After
 * KMP_REPLY call it again until it says KMP_MORE; after KMP_CLOSE never again.
 */
enum kerf_kmp_result kerf_kmp_feed(struct kerf_kmp *k, const struct kerf_kmp_identity *id,
				   const struct kerf_kmp_figures *figures, const u8 **data, u32 *len)
{
	u64 now = figures->boottime_ns;
	struct kmp_header header;
	u16 code;

	k->reply_len = 0;
	/* Each round takes at least a header from the input, or ends. */
	do {
		if (!fill(k, KMP_HEADER_SIZE, data, len))
			return KMP_MORE;
		code = check_header(k->frame, &header);
		if (code)
			return refuse(k, code, header.type, header.sequence, now);
		/* A long frame of another channel is not stored, nor is the next one looked for behind it. */
		if (header.payload_len > KMP_PAYLOAD_MAX)
			return refuse(k, KMP_E_TOO_LARGE, header.type, header.sequence, now);
		if (!fill(k, KMP_HEADER_SIZE + header.payload_len, data, len))
			return KMP_MORE;
		put_unaligned_le32(0, k->frame + 24);
		if (kerf_crc32(0, k->frame, KMP_HEADER_SIZE + header.payload_len) != header.crc)
			return refuse(k, KMP_E_CRC, header.type, header.sequence, now);
		k->have = 0;
	} while (is_answer(header.type));
	if (!k->greeted && header.type == KMP_HELLO)
		return hello(k, id, &header, now);
	if (k->greeted && header.type == KMP_HEARTBEAT_REQ)
		return heartbeat(k, figures, &header);
	return refuse(k, KMP_E_UNEXPECTED, header.type, header.sequence, now);
}
