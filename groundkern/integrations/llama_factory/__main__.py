"""`python -m groundkern.integrations.llama_factory`, and the file that torchrun is given."""

from groundkern.integrations.llama_factory import main

if __name__ == "__main__":
    main()
