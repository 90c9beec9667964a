/*
 * Entry: rdi = struct boot_info, rsi = number of the vCPU, rsp = top of its
 * stack.  The loader has mapped bss as zero pages, so this only prepares the
 * stack.
 */
#include <restrictedmem/guest.h>

	.section .text.start, "ax"
	.globl	_start
	.weak	secondary
_start:
	xorl	%ebp, %ebp
	andq	$-16, %rsp		/* the C ABI's alignment at a call */
	testq	%rsi, %rsi
	jnz	1f
	call	main
	movl	%eax, %edi
	movl	$HYPERCALL_EXIT, %eax
	call	HYPERCALL_PAGE
	ud2				/* exit must not return */

1:	movl	$secondary, %eax	/* 0 when the guest has none */
	testl	%eax, %eax
	jz	2f
	call	*%rax
2:	movl	$HYPERCALL_PARK, %eax
	call	HYPERCALL_PAGE
	ud2				/* park must not return */

	.section .note.GNU-stack, "", @progbits
