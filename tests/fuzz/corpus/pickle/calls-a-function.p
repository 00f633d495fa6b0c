cos
system
(S'true'
tR.