"""The software engine: guest code runs on Unicorn; each TLB miss is a fault of our MMU."""
