/*
 * A guest of a few kilobytes that knows what its memory must hold.
 *
 * Each page of a region has a generation, kept in a table elsewhere in guest RAM. The words of a page are a function of
 * its number and generation, so a page that was lost, mixed up with another, or set back to an older version is noticed
 * the next time it is read. The guest dirties a working set at a set rate, checks each page before it writes it, and
 * sweeps slowly over all the others. A table that was itself set back is noticed by `V`, which compares the sum of all
 * generations with a count of the writes.
 *
 * Command line (multiboot): mem=START..END (MiB) rate=MB/s set=MiB pattern=uniform|hot|seq
 * fill=random|text|zero|none cpus=1|2 sweep=PAGES/ms every=MS. `fill=text` writes what compresses well: each page has words
 * of its own, and repeats sixteen of them. `fill=zero` writes zeroes, `fill=none` leaves the pages untouched. `pattern=hot`:
 * nine of ten writes go to a tenth of the set.
 *
 * On COM1, out: one byte with its top bit set each millisecond (a beat; the low seven bits count), and between them
 * lines of text: `FILLED pages=`, every 100 ms (`every=`) `OK tick= dirtied= checked=`, `VERIFIED pages=`, `CORRUPT ...`.
 * In: `V` asks to check every page now, `R` and a number and a newline sets the rate. `T` asks how long the first touch of
 * a page took each time since the `T` before: `TOUCHED tsc_per_ms=` and, for each bucket that is not empty, its number
 * and what it holds (see `bucket`).
 *
 * With two CPUs each has half of the region and of the working set. Both halt when there is nothing to do.
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#define COM1 0x3f8
#define PAGE_WORDS 1024u
#define PAGES_PER_MIB 256u
#define MAX_CPUS 2u
/* The generations: below the region, above the image. Room for 3 GiB of pages. */
#define TABLE ((volatile u32 *)0x400000)
#define FIRST_MIB 8u
#define TRAMPOLINE 0x8000u
#define LAPIC 0xfee00000u
#define VECTOR_TIMER 0x20
#define VECTOR_TICK 0x40
/* Work that was due while nothing ran (a pause, a busy host) is made up for at most this many milliseconds. */
#define CATCH_UP_MS 10u
#define VERIFY_SLICE 64u
#define BUCKETS 128u
/* How long the time-stamp counter is held against the timer, at the start. */
#define CALIBRATE_MS 50u

enum pattern { UNIFORM, HOT, SEQUENTIAL };
enum fill { RANDOM, TEXT, ZERO, NONE };

/* What each CPU has to do; its own cache line. */
struct cpu {
    u32 first, pages;       /* part of the region, as page numbers */
    u32 set;                /* of which so many are dirtied */
    u32 random, next;       /* state of the patterns */
    u32 sweep, unverified;  /* where the sweep stands; how much of a verification is left */
    u32 dirtied, checked;
    volatile u32 filled, verify;
} __attribute__((aligned(64)));

static struct cpu cpus[MAX_CPUS];
static u32 cpu_count = 1, base_page, region_pages, sweep_pages = 2, state_every = 100;
static volatile u32 rate;   /* MB/s, of the whole guest */
static enum pattern pattern;
static enum fill fill;
static volatile u32 ticks, corrupt_reported;
/* First touches of pages, by how long they took. */
static volatile u32 touches[MAX_CPUS][BUCKETS];
static u32 tsc_per_ms;

void *memset(void *to, int byte, u32 n)
{
    for (u8 *p = to; n--;)
        *p++ = (u8)byte;
    return to;
}

void *memcpy(void *to, const void *from, u32 n)
{
    u8 *t = to;
    for (const u8 *f = from; n--;)
        *t++ = *f++;
    return to;
}

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline u8 inb(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* Text on COM1. */

static volatile u32 text_lock;

static void put_char(char c)
{
    while (!(inb(COM1 + 5) & 0x20))
        ;
    outb(COM1, (u8)c);
}

static void put_text(const char *text)
{
    while (*text)
        put_char(*text++);
}

static void put_number(const char *name, u32 value)
{
    char digits[11];
    int n = 10;
    digits[10] = 0;
    do {
        digits[--n] = (char)('0' + value % 10);
        value /= 10;
    } while (value);
    put_text(name);
    put_text(digits + n);
}

static void put_hex(const char *name, u32 value)
{
    put_text(name);
    for (int shift = 28; shift >= 0; shift -= 4)
        put_char("0123456789abcdef"[value >> shift & 15]);
}

static void begin_line(void)
{
    while (__sync_lock_test_and_set(&text_lock, 1))
        __asm__ volatile("pause");
}

static void end_line(void)
{
    put_char('\n');
    __sync_lock_release(&text_lock);
}

static void corrupt(const char *what, u32 page, u32 word, u32 got, u32 want)
{
    if (__sync_fetch_and_add(&corrupt_reported, 1) >= 16)
        return;
    begin_line();
    put_text("CORRUPT ");
    put_text(what);
    put_number(" page=", base_page + page);
    put_number(" word=", word);
    put_number(" gen=", TABLE[page]);
    put_hex(" got=", got);
    put_hex(" want=", want);
    end_line();
}

/* What the words of a page must be. Four of them change with its generation, the rest never. */

#define SLOTS 4u
static const u16 slot_word[SLOTS] = {0, 341, 682, 1023};

static inline u32 mixed(u32 a, u32 b)
{
    u32 h = (a * 2654435761u + b) * 0x85ebca6bu;
    return h ^ h >> 13;
}

static inline u32 fixed_word(u32 page, u32 word)
{
    if (fill == TEXT)
        word = mixed(page, word) >> 28;
    return fill == RANDOM || fill == TEXT ? mixed(page, word) : 0;
}

static inline u32 slot_value(u32 page, u32 slot, u32 generation)
{
    if (generation == 0)
        return fixed_word(page, slot_word[slot]);
    return mixed(page + slot * 0x10000000u, generation * 0x9e3779b1u);
}

static inline volatile u32 *page_at(u32 page) { return (volatile u32 *)((base_page + page) << 12); }

/* How long a touch takes. */

static inline unsigned long long tsc(void)
{
    unsigned long long now;
    __asm__ volatile("rdtsc" : "=A"(now));
    return now;
}

/* Four buckets for each power of two: bucket 4(n - 1) + m holds from (4 + m) 2^(n - 2) up. */
static u32 bucket(unsigned long long taken)
{
    u32 low = (u32)taken;
    if (taken >> 32)
        return BUCKETS - 1;
    if (low < 4)
        return low;
    u32 power = 31 - (u32)__builtin_clz(low);
    return (power - 1) * 4 + (low >> (power - 2) & 3);
}

/* With the interrupts off: the beat's output would be counted otherwise. */
static inline void touch(struct cpu *cpu, volatile u32 *p)
{
    __asm__ volatile("cli");
    unsigned long long begun = tsc();
    (void)p[0];
    u32 held = bucket(tsc() - begun);
    __asm__ volatile("sti");
    touches[cpu - cpus][held]++;
}

static void put_touches(void)
{
    begin_line();
    put_number("TOUCHED tsc_per_ms=", tsc_per_ms);
    for (u32 b = 0; b < BUCKETS; b++) {
        u32 sum = 0;
        for (u32 i = 0; i < cpu_count; i++) {
            sum += touches[i][b];
            touches[i][b] = 0;
        }
        if (sum) {
            put_number(" ", b);
            put_number(":", sum);
        }
    }
    end_line();
}

static inline void check_slots(volatile u32 *p, u32 page, u32 generation)
{
    for (u32 s = 0; s < SLOTS; s++) {
        u32 got = p[slot_word[s]], want = slot_value(page, s, generation);
        if (got != want)
            corrupt("slot", page, slot_word[s], got, want);
    }
}

static void check_page(struct cpu *cpu, u32 page)
{
    u32 generation = TABLE[page], slot = 0;
    volatile u32 *p = page_at(page);
    if (fill == NONE && generation == 0)
        return; /* reading it would allocate it */
    touch(cpu, p);
    check_slots(p, page, generation);
    for (u32 w = 0; w < PAGE_WORDS; w++) {
        if (w == slot_word[slot]) {
            slot++;
            continue;
        }
        u32 got = p[w], want = fixed_word(page, w);
        if (got != want) {
            corrupt("fixed", page, w, got, want);
            break;
        }
    }
}

static void dirty_page(struct cpu *cpu, u32 page)
{
    u32 generation = TABLE[page];
    volatile u32 *p = page_at(page);
    touch(cpu, p);
    check_slots(p, page, generation);
    TABLE[page] = ++generation;
    for (u32 s = 0; s < SLOTS; s++)
        p[slot_word[s]] = slot_value(page, s, generation);
    cpu->dirtied++;
    cpu->checked++;
}

static void fill_part(struct cpu *cpu)
{
    for (u32 page = cpu->first; page < cpu->first + cpu->pages; page++) {
        TABLE[page] = 0;
        if (fill == NONE)
            continue;
        volatile u32 *p = page_at(page);
        for (u32 w = 0; w < PAGE_WORDS; w++)
            p[w] = fixed_word(page, w);
    }
    cpu->filled = 1;
}

/* What a CPU does in each millisecond. */

static u32 next_random(struct cpu *cpu)
{
    u32 x = cpu->random;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return cpu->random = x;
}

static u32 below(u32 random, u32 n) /* random * n / 2^32, without a 64-bit division */
{
    u32 high;
    __asm__("mull %2" : "=d"(high), "+a"(random) : "rm"(n) : "cc");
    return high;
}

static u32 next_page(struct cpu *cpu)
{
    u32 range = cpu->set;
    if (pattern == SEQUENTIAL) {
        if (cpu->next >= cpu->set)
            cpu->next = 0;
        return cpu->first + cpu->next++;
    }
    if (pattern == HOT && below(next_random(cpu), 10) != 0)
        range = (cpu->set + 9) / 10; /* nine of ten touches go to a tenth of the set */
    return cpu->first + below(next_random(cpu), range);
}

static void sweep(struct cpu *cpu, u32 pages)
{
    for (u32 n = 0; n < pages && cpu->pages; n++) {
        if (cpu->sweep >= cpu->pages)
            cpu->sweep = 0;
        check_page(cpu, cpu->first + cpu->sweep++);
        cpu->checked++;
    }
}

static void verify_slice(struct cpu *cpu)
{
    u32 slice = cpu->unverified < VERIFY_SLICE ? cpu->unverified : VERIFY_SLICE;
    sweep(cpu, slice);
    cpu->unverified -= slice;
    if (cpu->unverified)
        return;
    u32 sum = 0;
    for (u32 page = cpu->first; page < cpu->first + cpu->pages; page++)
        sum += TABLE[page];
    if (sum != cpu->dirtied)
        corrupt("table", cpu->first, 0, sum, cpu->dirtied);
    cpu->verify = 0;
}

/* Lines and commands: the first CPU only. */

static u32 total(u32 dirtied)
{
    u32 sum = 0;
    for (u32 i = 0; i < cpu_count; i++)
        sum += dirtied ? cpus[i].dirtied : cpus[i].checked;
    return sum;
}

static void put_state(void)
{
    begin_line();
    put_number("OK tick=", ticks);
    put_number(" dirtied=", total(1));
    put_number(" checked=", total(0));
    end_line();
}

static void start_verify(void)
{
    for (u32 i = 0; i < cpu_count; i++) {
        cpus[i].unverified = cpus[i].pages;
        __sync_synchronize();
        cpus[i].verify = 1;
    }
}

static void attend(void)
{
    static u32 state_due, verifying, number, in_number;
    while (inb(COM1 + 5) & 1) {
        char c = (char)inb(COM1);
        if (c == 'V' && !verifying) {
            verifying = 1;
            start_verify();
        } else if (c == 'T') {
            put_touches();
        } else if (c == 'R') {
            in_number = 1;
            number = 0;
        } else if (in_number && c >= '0' && c <= '9') {
            number = number * 10 + (u32)(c - '0');
        } else if (in_number && c == '\n') {
            rate = number;
            in_number = 0;
        }
    }
    if (verifying && !cpus[0].verify && !(cpu_count > 1 && cpus[1].verify)) {
        verifying = 0;
        begin_line();
        put_number("VERIFIED pages=", region_pages);
        put_number(" corrupt=", corrupt_reported);
        end_line();
    }
    if (ticks - state_due < 0x80000000u) {
        put_state();
        state_due = ticks + state_every;
    }
}

static void work(struct cpu *cpu)
{
    u32 seen = ticks, due = 0; /* thousandths of a page */
    for (;;) {
        u32 now = ticks, passed = now - seen;
        seen = now;
        if (passed > CATCH_UP_MS)
            passed = CATCH_UP_MS;
        u32 each_ms = rate * 244 / cpu_count; /* 1 MB/s is 244.14 pages a second */
        due += passed * each_ms;
        if (due > each_ms * CATCH_UP_MS)
            due = each_ms * CATCH_UP_MS;
        for (; due >= 1000 && cpu->set && ticks - now < CATCH_UP_MS; due -= 1000)
            dirty_page(cpu, next_page(cpu));
        if (cpu->verify)
            verify_slice(cpu);
        else if (passed)
            sweep(cpu, sweep_pages);
        if (cpu == &cpus[0] && passed)
            attend();
        __asm__ volatile("cli");
        if (ticks == seen && !cpu->verify)
            __asm__ volatile("sti; hlt");
        else
            __asm__ volatile("sti");
    }
}

/* Interrupts. */

struct frame;
struct gate {
    u16 offset_low, selector;
    u8 zero, flags;
    u16 offset_high;
} __attribute__((packed));
static struct gate idt[256];

static inline volatile u32 *lapic(u32 reg) { return (volatile u32 *)(LAPIC + reg); }

__attribute__((interrupt)) static void on_timer(struct frame *frame)
{
    (void)frame;
    ticks++;
    if (inb(COM1 + 5) & 0x20)
        outb(COM1, (u8)(0x80 | (ticks & 0x7f)));
    if (cpu_count > 1)
        *lapic(0x300) = 0xc0000 | VECTOR_TICK; /* to all but this CPU */
    outb(0x20, 0x20);
}

__attribute__((interrupt)) static void on_tick(struct frame *frame)
{
    (void)frame;
    *lapic(0xb0) = 0;
}

__attribute__((interrupt)) static void on_spurious(struct frame *frame) { (void)frame; }

__attribute__((interrupt)) static void on_fault(struct frame *frame)
{
    (void)frame;
    put_text("\nCORRUPT fault: the CPU took an exception\n");
    for (;;)
        __asm__ volatile("cli; hlt");
}

static void set_gate(u32 vector, void (*handler)(struct frame *))
{
    u32 address = (u32)handler;
    idt[vector] = (struct gate){(u16)address, 0x08, 0, 0x8e, (u16)(address >> 16)};
}

static void load_idt(void)
{
    struct {
        u16 limit;
        u32 base;
    } __attribute__((packed)) pointer = {sizeof idt - 1, (u32)idt};
    __asm__ volatile("lidt %0" ::"m"(pointer));
}

static void start_interrupts(void)
{
    for (u32 v = 0; v < 256; v++)
        set_gate(v, v < 32 ? on_fault : on_spurious);
    set_gate(VECTOR_TIMER, on_timer);
    set_gate(VECTOR_TICK, on_tick);
    load_idt();
    /* Both 8259s to vectors 0x20 and up, only the timer's line open. */
    static const u8 first[] = {0x11, 0x20, 4, 1}, second[] = {0x11, 0x28, 2, 1};
    for (u32 i = 0; i < 4; i++) {
        outb(i ? 0x21 : 0x20, first[i]);
        outb(i ? 0xa1 : 0xa0, second[i]);
    }
    outb(0x21, 0xfe);
    outb(0xa1, 0xff);
    /* The 8254's channel 0: a rate generator of 1193182 / 1193 Hz. */
    outb(0x43, 0x34);
    outb(0x40, 1193 & 0xff);
    outb(0x40, 1193 >> 8);
    *lapic(0xf0) = 0x1ff;
    __asm__ volatile("sti");
}

static void wait_ms(u32 ms)
{
    for (u32 from = ticks; ticks - from < ms;)
        __asm__ volatile("hlt");
}

static void calibrate(void)
{
    wait_ms(1);
    unsigned long long begun = tsc();
    wait_ms(CALIBRATE_MS);
    tsc_per_ms = (u32)(tsc() - begun) / CALIBRATE_MS;
}

extern const u8 trampoline[], trampoline_end[];

static void start_second_cpu(void)
{
    memcpy((void *)TRAMPOLINE, trampoline, (u32)(trampoline_end - trampoline));
    *lapic(0x310) = 1u << 24;
    *lapic(0x300) = 0x4500; /* INIT */
    wait_ms(10);
    for (int i = 0; i < 2; i++) {
        *lapic(0x310) = 1u << 24;
        *lapic(0x300) = 0x4600 | TRAMPOLINE >> 12; /* start-up */
        wait_ms(1);
    }
}

void second_cpu(void)
{
    load_idt();
    *lapic(0xf0) = 0x1ff;
    __asm__ volatile("sti");
    fill_part(&cpus[1]);
    work(&cpus[1]);
}

/* The command line. */

static const char *option(const char *line, const char *name)
{
    for (; *line; line++) {
        const char *l = line, *n = name;
        while (*n && *l == *n)
            l++, n++;
        if (!*n)
            return l;
    }
    return 0;
}

static u32 number(const char **text, u32 otherwise)
{
    u32 value = 0;
    if (!*text || **text < '0' || **text > '9')
        return otherwise;
    for (; **text >= '0' && **text <= '9'; ++*text)
        value = value * 10 + (u32)(**text - '0');
    return value;
}

static void read_options(const char *line)
{
    const char *mem = option(line, "mem="), *at;
    u32 start = number(&mem, 16), end = start;
    if (mem && *mem == '.' && (mem += 2))
        end = number(&mem, start);
    if (start < FIRST_MIB)
        start = FIRST_MIB;
    if (end < start)
        end = start;
    base_page = start * PAGES_PER_MIB;
    region_pages = (end - start) * PAGES_PER_MIB;
    at = option(line, "rate="), rate = number(&at, 0);
    at = option(line, "sweep="), sweep_pages = number(&at, 2);
    at = option(line, "every="), state_every = number(&at, 100);
    at = option(line, "cpus="), cpu_count = number(&at, 1) > 1 ? 2 : 1;
    at = option(line, "set=");
    u32 set = number(&at, end - start) * PAGES_PER_MIB;
    if ((at = option(line, "pattern=")))
        pattern = *at == 'h' ? HOT : *at == 's' ? SEQUENTIAL : UNIFORM;
    if ((at = option(line, "fill=")))
        fill = *at == 'z' ? ZERO : *at == 'n' ? NONE : *at == 't' ? TEXT : RANDOM;
    for (u32 i = 0; i < cpu_count; i++) {
        struct cpu *cpu = &cpus[i];
        cpu->pages = region_pages / cpu_count;
        cpu->first = i * cpu->pages;
        cpu->set = set / cpu_count < cpu->pages ? set / cpu_count : cpu->pages;
        cpu->random = 2463534242u + i * 362436069u;
    }
}

void first_cpu(const u32 *multiboot)
{
    read_options(multiboot[0] & 4 ? (const char *)multiboot[4] : "");
    start_interrupts();
    calibrate();
    if (cpu_count > 1)
        start_second_cpu();
    fill_part(&cpus[0]);
    while (cpu_count > 1 && !cpus[1].filled)
        __asm__ volatile("hlt");
    begin_line();
    put_number("FILLED pages=", region_pages);
    end_line();
    work(&cpus[0]);
}
