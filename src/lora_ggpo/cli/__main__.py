from lora_ggpo.cli import main

if __name__ == "__main__":
    main()
