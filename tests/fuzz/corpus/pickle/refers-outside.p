Pidentity
.