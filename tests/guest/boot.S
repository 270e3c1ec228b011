/* Entry of the guest: the multiboot header, the first CPU's start, and the real-mode start of the second CPU. */

    .section .multiboot, "a"
    .align 4
    .long 0x1BADB002                /* magic */
    .long 0                         /* flags: nothing wanted */
    .long -0x1BADB002               /* checksum */

    .text
    .globl _start
_start:
    cli
    lgdt gdt_pointer
    ljmp $0x08, $1f
1:  movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $stack_top, %esp
    pushl %ebx                      /* the multiboot information */
    call first_cpu
2:  hlt
    jmp 2b

/* Copied to 0x8000, where a start-up IPI with vector 8 begins in real mode. */
    .globl trampoline, trampoline_end
    .code16
trampoline:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl 0x8000 + (trampoline_gdt_pointer - trampoline)
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $0x08, $second_cpu_32
    .align 4
trampoline_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:

    .code32
second_cpu_32:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $stack_top_second, %esp
    call second_cpu
3:  hlt
    jmp 3b

    .section .data
    .align 8
gdt:
    .quad 0
    .quad 0x00CF9A000000FFFF        /* 0x08: code, flat */
    .quad 0x00CF92000000FFFF        /* 0x10: data, flat */
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt

    .section .bss
    .align 16
    .skip 16384
stack_top:
    .skip 16384
stack_top_second:

    .section .note.GNU-stack, "", @progbits
