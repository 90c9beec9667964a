"""Numbers, structs and calls of the kernel's headers; one module for each header's subject. Imports nothing above itself."""
