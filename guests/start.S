/*
 * Entry: rdi = struct boot_info, rsp = top of private memory.  The loader has
 * mapped bss as zero pages, so nothing is left to prepare but the stack.
 */
#include <restrictedmem/guest.h>

	.section .text.start, "ax"
	.globl	_start
_start:
	xorl	%ebp, %ebp
	andq	$-16, %rsp		/* the C ABI's alignment at a call */
	call	main
	movl	%eax, %edi
	movl	$HYPERCALL_EXIT, %eax
	call	HYPERCALL_PAGE
	ud2				/* exit must not return */

	.section .note.GNU-stack, "", @progbits
