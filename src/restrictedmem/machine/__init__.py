"""What the machine offers, found by trying: each probe is quick, needs no privilege, and leaves nothing behind."""
