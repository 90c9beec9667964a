"""The software engine: guest code on Unicorn, each TLB miss of it a fault of our MMU."""
